"""Generation as a whole, one sequence: prefill, then token after token, over 4-bit weights; ours against llama.cpp.

All contestants have the shape of a 1.1B LLaMA and random weights, the head in 4 bits too, and take the likeliest token
each time. Each loads in a process of its own and waits there for its turns, so that a slow moment hits all alike.
GB/s are the bytes of weights (codes and scales) that one token reads, over its time; the roof is a plain read of memory
in the same run.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch
from random_llama import Shape, make_model, write_gguf

import llamakern
from llamakern.bench import Table, roofs
from llamakern.bench.table import add_arguments, against_roofs, summary

CONTESTANTS = {
    "llamakern": "llamakern, NF4, absmax in float32",
    "llamakern double": "llamakern, NF4, absmax quantised too",
    "llama.cpp": "llama.cpp, Q4_0",
    "llama.cpp flash": "llama.cpp, Q4_0, its flash attention",
    "bitsandbytes": "transformers' generate over bitsandbytes' NF4",
    "bfloat16": "transformers' generate, dense bfloat16",
}
OURS = {"llamakern": "", "llamakern double": " double-quantised"}  # and what their rows are called
BITS = {"llamakern": 4.5, "llamakern double": 4.127, "llama.cpp": 4.5, "llama.cpp flash": 4.5, "bitsandbytes": 4.5}
NEEDS = {"llama.cpp": "llama_cpp", "bitsandbytes": "bitsandbytes", "bfloat16": "transformers"}
TITLE = "generate_llama_cpp"
SMALL = Shape(C=256, FFN=704, layers=2, H=8, Hkv=2, V=2048)


# -------------------------------------------------------------------------------- the contestants: (prefill, decode)


def ours(shape: Shape, prompt: int, new: int, *, double_quant: bool):
    model = make_model(shape, prompt + new, double_quant=double_quant)
    tokens = torch.randint(shape.V, (1, prompt), generator=torch.Generator().manual_seed(1))

    def run(n: int) -> list[float]:
        marks = [time.perf_counter()]
        llamakern.generate(model, tokens, max_new_tokens=n, on_token=lambda _: marks.append(time.perf_counter()))
        return [b - a for a, b in pairwise(marks)]

    return run


def llama_cpp(shape: Shape, prompt: int, new: int, *, gguf: str, flash: bool):
    """Its C functions by themselves, without sampler; numpy takes the likeliest token."""
    import llama_cpp as lib
    import numpy as np

    quiet = lib.llama_log_callback(lambda *_: None)  # kept alive by `run`
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(gguf.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = max(256, prompt + new), prompt, prompt
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    kinds = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = kinds[0 if flash else 1]
    context = lib.llama_init_from_model(model, params)
    tokens = np.random.default_rng(1).integers(0, shape.V, prompt).astype(np.int32)

    def decode(ids) -> int:
        ids = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(ids, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (shape.V,)).argmax())

    def run(n: int, quiet=quiet) -> list[float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        times, ids = [], tokens.tolist()
        for _ in range(n):
            start = time.perf_counter()
            ids = [decode(ids)]
            times.append(time.perf_counter() - start)
        return times

    return run


def transformers(shape: Shape, prompt: int, new: int, *, quantized: bool):
    import transformers as lib
    from transformers.generation.streamers import BaseStreamer

    config = lib.LlamaConfig(
        hidden_size=shape.C, intermediate_size=shape.FFN, num_hidden_layers=shape.layers, vocab_size=shape.V,
        num_attention_heads=shape.H, num_key_value_heads=shape.Hkv, max_position_embeddings=prompt + new,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = lib.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if quantized:
        to_bitsandbytes(model)
    model.eval()
    tokens = torch.randint(shape.V, (1, prompt), generator=torch.Generator().manual_seed(1))

    class Clock(BaseStreamer):
        def __init__(self):
            self.marks = []

        def put(self, value):
            self.marks.append(time.perf_counter())

        def end(self):
            pass

    def run(n: int) -> list[float]:
        clock = Clock()  # its first call comes with the prompt
        with torch.inference_mode():
            model.generate(tokens, max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0, streamer=clock)
        return [b - a for a, b in pairwise(clock.marks)]

    return run


def to_bitsandbytes(model: torch.nn.Module) -> None:
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                    compress_statistics=False,
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
                )
                setattr(parent, name, new.to("cpu"))


def make(name: str, shape: Shape, prompt: int, new: int, gguf: str):
    if name.startswith("llamakern"):
        return ours(shape, prompt, new, double_quant=name.endswith("double"))
    if name.startswith("llama.cpp"):
        return llama_cpp(shape, prompt, new, gguf=gguf, flash=name.endswith("flash"))
    return transformers(shape, prompt, new, quantized=name == "bitsandbytes")


def child(name: str, shape: Shape, prompt: int, new: int, gguf: str) -> None:
    """One round for each line of standard input: seconds of the prefill and of each token after it."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    run = make(name, shape, prompt, new, gguf)
    run(3)
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), file=results, flush=True)


# --------------------------------------------------------------------------------------------------------- the race


class Child:
    def __init__(self, name: str, shape: Shape, args, gguf: Path):
        arguments = ["--child", name, "--shape", json.dumps(asdict(shape)), "--gguf", str(gguf)]
        arguments += ["--prompt", str(args.prompt), "--new", str(args.new)]
        command = [sys.executable, __file__, *arguments]
        self.name, self.log = name, gguf.with_name(f"{name}.log")
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self.answer()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return line

    def run(self, new: int) -> tuple[float, float]:
        """Seconds of the prefill, and the median of those of a token."""
        print(new, file=self.process.stdin, flush=True)
        prefill, *tokens = json.loads(self.answer())
        return prefill, statistics.median(tokens)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def rate(roof: roofs.Roof) -> float:
    """What the machine does at that moment: the middle of a few turns."""
    found = []
    for _ in range(9):
        start = time.perf_counter()
        roof()
        found.append(roof.work / (time.perf_counter() - start))
    return statistics.median(found)


def race(names: list[str], shape: Shape, args, folder: Path) -> tuple[dict, dict, dict]:
    """Seconds of a prefill and of a token in each round, {name: list} both, and the roofs beside them."""
    gguf = folder / "model.gguf"
    if any(name.startswith("llama.cpp") for name in names):
        write_gguf(shape, args.prompt + args.new, gguf)
    children, beside = [], {"dot": roofs.dot(torch.bfloat16), "read": roofs.read()}
    prefill, token = ({name: [] for name in names} for _ in range(2))
    rates = {name: [] for name in beside}
    try:
        for name in names:
            children.append(Child(name, shape, args, gguf))
            print(f"  {name} is ready", file=sys.stderr)
        for _ in range(args.rounds):
            for name, roof in beside.items():
                rates[name].append(rate(roof))
            for one in children:
                time.sleep(0.1)  # until the other's threads sleep
                first, then = one.run(args.new)
                prefill[one.name].append(first)
                token[one.name].append(then)
    finally:
        for one in children:
            one.close()
    return prefill, token, rates


def missing(name: str) -> str | None:
    """Why a contestant cannot run."""
    needs = NEEDS.get(name.removesuffix(" flash"))
    return None if needs is None or importlib.util.find_spec(needs) else f"{needs} is not installed"


def row(label: str, first: str, times: dict, rates: dict, *, flops: int, bytes_moved: int, tokens: int) -> dict:
    """A line of the table with `first` as ours."""
    times = {first: times[first]} | {name: some for name, some in times.items() if name != first}
    line = {"shape": label, **summary(times), "flops": flops, "bytes": bytes_moved}
    line |= against_roofs(times[first], rates, flops, bytes_moved)
    return line | {"error": None, "turns": len(times[first]), "tokens": tokens}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens made after it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (%(default)s)")
    parser.add_argument("--only", choices=CONTESTANTS, action="append", help="this contestant, may be repeated")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--gguf", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.child:
        child(args.child, Shape(**args.shape), args.prompt, args.new, args.gguf)
        return
    (model, shape), table = ("small", SMALL) if args.small else ("1.1B", Shape()), Table(TITLE, args)
    wanted = args.only or list(CONTESTANTS)
    absent = {name: why for name in wanted if (why := missing(name))}
    with tempfile.TemporaryDirectory() as folder:
        prefill, token, rates = race([name for name in wanted if name not in absent], shape, args, Path(folder))
    for name, some in token.items():
        per_s, prefill_per_s = 1 / statistics.median(some), args.prompt / statistics.median(prefill[name])
        read = shape.weights() * BITS.get(name, 16) / 8 * per_s
        speed = f"{per_s:7.1f} tokens/s, {read / 1e9:5.1f} GB/s of weights"
        print(f"{CONTESTANTS[name]:46s} {speed}   prefill {prefill_per_s:7.1f} tokens/s")
    for name, kind in OURS.items():
        if name in token:
            rest = {other: some for other, some in token.items() if other == name or other not in OURS}
            amounts = {"flops": 2 * shape.weights(), "bytes_moved": int(shape.weights() * BITS[name] / 8)}
            label = f"{model} decode{kind} prompt={args.prompt}"
            line = row(label, name, rest, {"read": rates["read"]}, tokens=1, **amounts)
            table.add(line | {"absent": absent})
            rest = {other: prefill[other] for other in rest}
            amounts = {"flops": shape.prefill_flops(args.prompt), "bytes_moved": 0}
            label = f"{model} prefill{kind} prompt={args.prompt}"
            line = row(label, name, rest, {"dot": rates["dot"]}, tokens=args.prompt, **amounts)
            table.add(line | {"absent": absent})
    table.done()


if __name__ == "__main__":
    main()
