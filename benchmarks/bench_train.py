"""A training step as a whole: our Llama against transformers + PEFT, over bitsandbytes for QLoRA.

    python benchmarks/bench_train.py --method qlora              the 158M model, LoRA of rank 16 on all linears
    python benchmarks/bench_train.py --method qlora --curve      the same with one sequence of 128 to 4096 tokens
    python benchmarks/bench_train.py --preset llama3-8b          ours alone, double-quantised, activations checkpointed

Each contestant runs in a process of its own, so that the peak of its memory is its own; they take turns, round by
round. All load the same random checkpoint and start at the same adapters; a step is loss, backward, clipping and fused
AdamW. The rival runs as PEFT sets it up, under autocast as transformers' Trainer does it, and with adapters in
bfloat16; the fastest of these counts.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch
from bench_transformers import Shape, write_checkpoint
from timing import machine
from torch import nn

from llamakern import Llama, LlamaConfig, peft
from llamakern.nn import NF4Linear
from llamakern.peft.base import linears
from llamakern.peft.base import replace as put
from llamakern.runs import peak_memory_mb, reset_peak_memory

RANK, ALPHA, LR, CLIP = 16, 32, 1e-3, 1.0
RIVALS = ("as PEFT sets it up", "autocast", "bfloat16 adapters")
CURVE = (128, 256, 512, 1024, 2047, 2048, 4096)
WARM = 2  # steps that are not timed
CLOSE = 5e-3  # of the loss: two ways to round in bfloat16


# ---------------------------------------------------------------------------------------------------------- contestants


class Ours:
    """llamakern.Llama."""

    def __init__(self, method: str, folder: Path):
        self.model = Llama.from_pretrained(folder, quantize="nf4" if method == "qlora" else None)
        peft.apply(self.model, peft.LoRAConfig(rank=RANK, alpha=ALPHA))

    def loss(self, tokens):
        return self.model.loss(tokens, next_tokens(tokens))


class Theirs:
    """transformers and PEFT; bitsandbytes for QLoRA."""

    def __init__(self, method: str, folder: Path, way: str):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        loading = {"dtype": torch.bfloat16}
        if method == "qlora":
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
            loading["quantization_config"] = BitsAndBytesConfig(**nf4)
        model = AutoModelForCausalLM.from_pretrained(folder, **loading)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config, autocast_adapter_dtype=way != RIVALS[2]).train()
        self.autocast = way == RIVALS[1]

    def loss(self, tokens):
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def contestant(name: str, method: str, folder: Path):
    """Ours or theirs, A of each adapter drawn from its linear's name alone."""
    made = Ours(method, folder) if name == "ours" else Theirs(method, folder, name)
    for at, p in made.model.named_parameters():
        if p.requires_grad and "lora_a" in at.lower():
            linear = at.lower().partition("layers.")[2].partition(".lora_a")[0]
            a = torch.empty(p.shape).uniform_(
                -1, 1, generator=torch.Generator().manual_seed(zlib.crc32(linear.encode()))
            )
            p.data.copy_(a * p.shape[1] ** -0.5)
    return made


def next_tokens(tokens):
    """labels (B, T): what each token shall predict."""
    return torch.cat((tokens[:, 1:], tokens.new_full((len(tokens), 1), -100)), 1)


def batches(shape: Shape, n: int) -> list[torch.Tensor]:
    """Random tokens, the low ones more often (Zipf's law), so that there is something to learn."""
    generator = torch.Generator().manual_seed(2)
    tokens = shape.V ** torch.rand(n, shape.B, shape.T, generator=generator)
    return list((tokens.long() - 1).clamp(0, shape.V - 1))


# -------------------------------------------------------------------------------------------------------------- one run


def step(made, params, optimizer, tokens) -> float:
    loss = made.loss(tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(params, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(made, shape: Shape, steps: int, warm: int = WARM) -> dict:
    """Seconds, losses and page faults of the steps, and the peak of the memory while they ran."""
    params = [p for p in made.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    reset_peak_memory()
    seconds, losses, faults = [], [], []
    for tokens in batches(shape, warm + steps):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        losses.append(step(made, params, optimizer, tokens))
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {
        "seconds": seconds[warm:],
        "losses": losses,
        "faults": statistics.median(faults[warm:]),
        "memory_mb": peak_memory_mb(),
        "kept_per_token": kept_bytes(made, batches(shape, 1)[0]) / (shape.B * shape.T),
    }


def kept_bytes(made, tokens) -> int:
    """Bytes that a forward keeps for its backward, beside the parameters."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = made.loss(tokens)  # alive until all are counted
    own = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    return sum(size for at, size in kept.items() if at not in own) + 0 * int(loss.numel())


def child(task: dict) -> dict:
    if task["preset"]:
        return preset(task["preset"], task["shape"].T, task["steps"])
    made = contestant(task["name"], task["method"], task["folder"])
    loading = peak_memory_mb()
    runs = [train(made, replace(task["shape"], B=B, T=T), task["steps"]) for B, T in task["sizes"]]
    return {"loading_mb": loading, "runs": runs}


# ------------------------------------------------------------------------------------------- a model too large for bf16


class Preset(Ours):
    """A published shape with random weights, double-quantised from the start; embedding and head are bfloat16."""

    def __init__(self, config: LlamaConfig):
        with torch.device("meta"):
            self.model = Llama(config)
        for name, linear in linears(self.model).items():
            put(self.model, name, random_nf4(linear.out_features, linear.in_features))
        for name, p in self.model.named_parameters():
            if p.is_meta:
                filled = torch.empty(p.shape, dtype=torch.bfloat16)
                put(self.model, name, nn.Parameter(filled.normal_(std=0.02) if p.dim() > 1 else filled.fill_(1)))
        self.model.checkpoint_activations = True
        peft.apply(self.model, peft.LoRAConfig(rank=RANK, alpha=ALPHA))


def random_nf4(N: int, K: int) -> NF4Linear:
    """Any codes are a weight; the scales make its standard deviation about 0.02."""
    made = NF4Linear(K, N, bias=False, double_quant=True)
    made.weight.random_(0, 256)
    made.absmax.random_(0, 256)
    made.absmax_scale.fill_(0.01)
    made.absmax_offset.fill_(0.03)
    return made


def preset(name: str, T: int, steps: int) -> dict:
    made = Preset(LlamaConfig.preset(name))
    loading = peak_memory_mb()
    shape = Shape(V=made.model.config.vocab_size, B=1, T=T)
    return {"loading_mb": loading, "runs": [train(made, shape, steps, warm=0)]}


# ---------------------------------------------------------------------------------------------------------- all of them


def in_child(task: dict) -> dict:
    text = json.dumps(task | {"shape": asdict(task["shape"]), "folder": str(task["folder"])})
    done = subprocess.run([sys.executable, __file__, "--child", text], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task['name']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def race(shape: Shape, method: str, sizes, names, rounds: int, steps: int) -> dict[str, list[dict]]:
    """For each contestant its results at each size, the rounds joined."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(replace(shape, T=max(T for _, T in sizes)), Path(folder))
        for _ in range(rounds):
            for name in names:
                task = {"name": name, "method": method, "folder": folder, "preset": None}
                result = in_child(task | {"shape": shape, "sizes": sizes, "steps": steps})
                print(f"  {name}: {[round(min(r['seconds']), 3) for r in result['runs']]} s", file=sys.stderr)
                found.setdefault(name, []).append(result)
    return {name: [join(rounds, i) for i in range(len(sizes))] for name, rounds in found.items()}


def join(rounds: list[dict], i: int) -> dict:
    runs = [r["runs"][i] for r in rounds]
    seconds = statistics.median(t for run in runs for t in run["seconds"])
    return runs[0] | {
        "ms": seconds * 1e3,
        "seconds": [t for run in runs for t in run["seconds"]],
        "memory_mb": statistics.median(run["memory_mb"] for run in runs),
        "loading_mb": statistics.median(r["loading_mb"] for r in rounds),
    }


def report(label: str, tokens: int, found: dict[str, dict], flops: int) -> dict:
    """Prints the contestants of one size and returns their row."""
    print(label)
    ours = found.get("ours") or next(iter(found.values()))
    for name, run in found.items():
        speed = f"{run['ms']:9.1f} ms ({run['ms'] / ours['ms']:5.2f}x) {tokens / run['ms'] * 1e3:7.0f} tokens/s"
        memory = f"{run['memory_mb']:6.0f} MB, {run['kept_per_token'] / 1e3:6.1f} KB kept per token"
        print(f"  {name:20s} {speed}  {memory}  {run['faults']:6.0f} faults  loss {run['losses'][-1]:.4f}")
    rivals = [run for name, run in found.items() if name in RIVALS]
    row = {"shape": label, "ms": {name: run["ms"] for name, run in found.items()}, "flops": flops, "bytes": 0}
    if "ours" in found and rivals:
        best = min(rivals, key=lambda run: run["ms"])
        row["error"] = max(abs(a / b - 1) for a, b in zip(ours["losses"], best["losses"], strict=True))
        apart = "" if row["error"] < CLOSE else f", MORE THAN {CLOSE}"
        share = f"{best['ms'] / ours['ms']:.2f}x our time, {ours['memory_mb'] / best['memory_mb']:.2f}x its memory"
        print(f"  best rival {share}; losses differ by {row['error']:.1e} at most{apart}")
    return row | {"runs": found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("qlora", "lora"), default="qlora")
    parser.add_argument("--preset", help="a published shape with random weights, ours alone: llama3-8b")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--curve", action="store_true", help=f"one sequence of {CURVE} tokens")
    parser.add_argument("--steps", type=int, default=6, help=f"timed steps of a run, after {WARM} others")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    parser.add_argument("--only", choices=("ours", *RIVALS), action="append", help="this contestant, may be repeated")
    parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.child:
        print(json.dumps(child(args.child | {"shape": Shape(**args.child["shape"])})))
        return
    print(f"{args.method} step\n{machine()}")
    shape = Shape(B=args.batch, T=args.tokens)
    if args.preset:
        task = {"name": "ours", "method": "qlora", "folder": "", "preset": args.preset, "sizes": []}
        result = in_child(task | {"shape": shape, "steps": args.steps})
        found = {"ours": join([result], 0)}
        print(
            f"loaded at {result['loading_mb'] / 1024:.2f} GiB, trained at {found['ours']['memory_mb'] / 1024:.2f} GiB"
        )
        label = f"qlora {args.preset} NF4 double-quantised, head bfloat16, checkpointed, B=1 T={args.tokens} bfloat16"
        rows = [report(label, args.tokens, found, 0)]
    else:
        sizes = [(1, T) for T in CURVE] if args.curve else [(args.batch, args.tokens)]
        found = race(shape, args.method, sizes, args.only or ["ours", *RIVALS], args.rounds, args.steps)
        rows = []
        for i, (B, T) in enumerate(sizes):
            size = replace(shape, B=B, T=T)
            label = f"{args.method} C={size.C} {size.layers} layers V={size.V} B={B} T={T} bfloat16"
            rows.append(report(label, B * T, {name: runs[i] for name, runs in found.items()}, size.flops()))
    if args.json:
        args.json.write_text(json.dumps({"title": "train", "machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
