"""A training step as a whole: our Llama against transformers + PEFT, over bitsandbytes for QLoRA.

Of a method that no one else has, the rival is the same model's step without it, through the same layers.

    python benchmarks/bench_train.py --method qlora              the 158M model, LoRA of rank 16 on all linears
    python benchmarks/bench_train.py --method adapter            LLaMA-Adapter in its top 6 layers, as PEFT computes it
    python benchmarks/bench_train.py --method qlora --curve      the same with one sequence of 128 to 4096 tokens
    python benchmarks/bench_train.py --method excitor            Excitor in the upper 6 layers against no method at all
    python benchmarks/bench_train.py --preset llama3-8b          ours alone, double-quantised, activations checkpointed

Each contestant loads in a process of its own, so that the peak of its memory is its own, and waits there for its turns,
so that a slow moment hits all alike. All load the same random checkpoint and start at the same adapters; a step is
loss, backward, clipping and fused AdamW. The rival runs as PEFT sets it up, under autocast as in
transformers' Trainer, and with adapters in bfloat16; the fastest of these counts. LLaMA-Adapter races its plain step
too: the same gradients through the same layers, and no prompts.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch
from bench_transformers import Shape, write_checkpoint
from torch import nn

from llamakern import Llama, LlamaConfig, peft
from llamakern.bench import Table, table
from llamakern.bench.clock import quartiles
from llamakern.bench.models import random_model
from llamakern.bench.step import step_flops
from llamakern.runs import peak_memory_mb, reset_peak_memory

RANK, ALPHA, LR, CLIP = 16, 32, 1e-3, 1.0
RIVALS = ("as PEFT sets it up", "autocast", "bfloat16 adapters")
PLAIN = "without the method"
PROMPTS, LAYERS = 10, 6  # of LLaMA-Adapter
CURVE = (128, 256, 512, 1024, 2047, 2048, 4096)
WARM = 2  # steps that are not timed
CLOSE = 5e-3  # of the loss: two ways to round in bfloat16


# ---------------------------------------------------------------------------------------------------------- contestants


def low_rank() -> peft.LoRAConfig:
    return peft.LoRAConfig(rank=RANK, alpha=ALPHA)


def prompts() -> peft.AdapterConfig:
    return peft.AdapterConfig(PROMPTS, LAYERS, gate_activation="none", gate_scope="layer")


OURS = {"qlora": low_rank, "lora": low_rank, "adapter": prompts, "excitor": peft.ExcitorConfig}


class Ours:
    """llamakern.Llama."""

    def __init__(self, method: str, folder: Path):
        self.model = Llama.from_pretrained(folder, quantize="nf4" if method == "qlora" else None)
        peft.apply(self.model, OURS[method]())

    def loss(self, tokens):
        return self.model.loss(tokens, next_tokens(tokens))


class Plain(Ours):
    """The same model, frozen, with the gradients that the method needs of it: down to its lowest layer's keys."""

    def __init__(self, method: str, folder: Path):
        super().__init__(method, folder)
        changed = {path for path, _, _ in self.model.peft_adapters["default"].places}
        peft.remove(self.model, "default")
        lowest = min(int(path.split(".")[1]) for path in changed)
        attention = self.model.layers[lowest].self_attn
        attention.attend = WantsGradient(attention.attend)


class WantsGradient(nn.Module):
    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, q, k, v, x, ctx):
        return self.base(q, k.detach().requires_grad_(), v, x, ctx)


class Preset(Ours):
    """A published shape with random weights, double-quantised from the start; embedding and head are bfloat16."""

    def __init__(self, name: str):
        self.model = random_model(LlamaConfig.preset(name), torch.bfloat16, nf4=True, double_quant=True)
        self.model.checkpoint_activations = True
        peft.apply(self.model, peft.LoRAConfig(rank=RANK, alpha=ALPHA))


class Theirs:
    """transformers and PEFT; bitsandbytes for QLoRA."""

    def __init__(self, method: str, folder: Path, way: str):
        from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        loading = {"dtype": torch.bfloat16}
        if method == "qlora":
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
            loading["quantization_config"] = BitsAndBytesConfig(**nf4)
        model = AutoModelForCausalLM.from_pretrained(folder, **loading)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        if method == "adapter":
            config = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=LAYERS, task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config, autocast_adapter_dtype=way != RIVALS[2]).train()
        self.autocast = way == RIVALS[1]

    def loss(self, tokens):
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def contestant(name: str, method: str, preset: str | None, folder: Path):
    """Ours or theirs, A of each adapter and the prompts of each layer drawn from its name alone."""
    if preset:
        return Preset(preset)
    if name in ("ours", PLAIN):
        made = (Ours if name == "ours" else Plain)(method, folder)
    else:
        made = Theirs(method, folder, name)
    for at, p in made.model.named_parameters():
        at = at.lower().partition("layers.")[2]
        generator = torch.Generator().manual_seed(zlib.crc32(at.partition(".lora_a")[0].encode()))
        if p.requires_grad and ".lora_a" in at:
            p.data.copy_(torch.empty(p.shape).uniform_(-1, 1, generator=generator) * p.shape[1] ** -0.5)
        elif p.requires_grad and p.numel() > 1 and "prompt" in at:
            generator.manual_seed(int(at.partition(".")[0]))
            p.data.copy_(torch.empty(p.shape).normal_(generator=generator))
    return made


def next_tokens(tokens):
    """labels (B, T): what each token shall predict."""
    return torch.cat((tokens[:, 1:], tokens.new_full((len(tokens), 1), -100)), 1)


def batches(shape: Shape):
    """Random tokens (B, T) without end, the low ones more often (Zipf's law), so that there is something to learn."""
    generator = torch.Generator().manual_seed(2)
    while True:
        tokens = shape.V ** torch.rand(shape.B, shape.T, generator=generator)
        yield (tokens.long() - 1).clamp(0, shape.V - 1)


# --------------------------------------------------------------------------------------------------- a child: its turns


def child(task: dict) -> None:
    """Loads, answers each line of the standard input with one step, and at its end with the memory."""
    shape = Shape(**task["shape"])
    made = contestant(task["name"], task["method"], task["preset"], Path(task["folder"]))
    params = [p for p in made.model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    answer(loading_mb=peak_memory_mb())
    reset_peak_memory()
    tokens = batches(shape)
    for _ in sys.stdin:
        start, faults = time.perf_counter(), page_faults()
        loss = step(made, params, optimizer, next(tokens))
        answer(seconds=time.perf_counter() - start, loss=loss, faults=page_faults() - faults)
    peak = peak_memory_mb()
    answer(memory_mb=peak, kept_per_token=kept_bytes(made, next(tokens)) / (shape.B * shape.T))


def answer(**values) -> None:
    print(json.dumps(values), flush=True)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def step(made, params, optimizer, tokens) -> float:
    loss = made.loss(tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(params, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def kept_bytes(made, tokens) -> int:
    """Bytes that a forward keeps for its backward, beside the parameters."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = made.loss(tokens)
    own = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    total = sum(size for at, size in kept.items() if at not in own)
    del loss  # until here it kept all of them at their places
    return total


# ------------------------------------------------------------------------------------------------ the parent: all turns


class Run:
    """One contestant's process and what it has answered."""

    def __init__(self, task: dict):
        self.name, self.steps = task["name"], []
        command = [sys.executable, __file__, "--child", json.dumps(task)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the child's; a full pipe would make it wait
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process, self.facts = subprocess.Popen(command, **pipes), {}

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{self.name} failed:\n{self.log.read()[-3000:]}")

    def turn(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self.read())

    def close(self) -> None:
        """Ends the child if it still runs."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def finish(self, warm: int) -> dict:
        """Seconds by step, losses, page faults of a step, memory."""
        self.process.stdin.close()
        self.facts |= self.read()
        self.process.wait()
        timed = self.steps[warm:]
        return self.facts | {
            "seconds": [s["seconds"] for s in timed],
            "losses": [s["loss"] for s in self.steps],
            "faults": quartiles([s["faults"] for s in timed])[1],
        }


def race(task: dict, names: list[str], steps: int, warm: int) -> dict[str, dict]:
    """What each contestant reached; they load one after the other, then take turns step by step."""
    runs = []
    try:
        for name in names:
            runs.append(Run(task | {"name": name}))
            runs[-1].facts = runs[-1].read()
        for _ in range(warm + steps):
            for run in runs:
                run.turn()
        return {run.name: run.finish(warm) for run in runs}
    finally:
        for run in runs:
            run.close()


def row(label: str, tokens: int, found: dict[str, dict], flops: float) -> dict:
    """The table's row: ours, the rivals from the fastest on, and the model without the method."""
    order = sorted(found, key=lambda name: (name != "ours", name == PLAIN, quartiles(found[name]["seconds"])[1]))
    first, best = found[order[0]], found[order[1]] if len(order) > 1 else None
    same = best and order[1] != PLAIN
    error = max(abs(a / b - 1) for a, b in zip(first["losses"], best["losses"], strict=True)) if same else None
    return {
        "shape": label,
        **table.summary({name: found[name]["seconds"] for name in order}),
        "flops": flops,
        "bytes": 0,
        "error": error,
        "tokens": tokens,
        "memory_mb": first["memory_mb"],
        "bytes_per_token": first["kept_per_token"],
        "runs": {name: found[name] for name in order},
    }


def details(made: dict) -> None:
    """One line for each contestant under the row."""
    ours = next(iter(made["runs"].values()))
    for name, run in made["runs"].items():
        speed = f"{made['tokens'] / made['ms'][name] * 1e3:7.0f} tokens/s"
        memory = f"{run['memory_mb']:6.0f} MB (ours {ours['memory_mb'] / run['memory_mb']:.2f}x), loaded at"
        kept = f"{run['loading_mb']:6.0f} MB, {run['kept_per_token'] / 1024:6.1f} KB kept per token"
        print(f"    {name:20s} {speed} {memory} {kept}, {run['faults']:7.0f} faults, loss {run['losses'][-1]:.4f}")
    if made["error"] is not None and made["error"] > CLOSE:
        raise SystemExit(f"{made['shape']}: losses must agree within {CLOSE}, got {made['error']:.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=OURS, default="qlora")
    parser.add_argument("--preset", help="a published shape with random weights, ours alone: llama3-8b")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step (%(default)s)")
    parser.add_argument("--curve", action="store_true", help=f"one sequence of {CURVE} tokens")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each contestant (%(default)s)")
    parser.add_argument(
        "--only", choices=("ours", *RIVALS, PLAIN), action="append", help="this contestant, may be repeated"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    table.add_arguments(parser)
    return parser.parse_args()


def main():
    args = parse()
    if args.child:
        return child(args.child)
    name = f"train_{args.preset}" if args.preset else f"train_{args.method}" + "_curve" * args.curve
    title = Table(name, args, axis="T" if args.curve else "")
    missing = args.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None
    absent = dict.fromkeys(RIVALS, "bitsandbytes is not installed") if missing else {}
    field = {"adapter": ("ours", PLAIN, *RIVALS[:2]), "excitor": ("ours", PLAIN)}.get(args.method, ("ours", *RIVALS))
    names = [name for name in args.only or field if name not in absent]
    task = {"method": args.method, "preset": args.preset, "folder": ""}
    if args.preset:
        config = LlamaConfig.preset(args.preset)
        shape = Shape(V=config.vocab_size, B=1, T=args.tokens)
        label = f"qlora {args.preset} double-quantised, bfloat16 head, checkpointed T={args.tokens} bfloat16"
        found = race(task | {"shape": asdict(shape)}, ["ours"], args.steps, warm=0)
        details(title.add(row(label, args.tokens, found, step_flops(config, args.tokens, 1, "qlora"))))
        return title.done()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Shape(T=max(CURVE)), Path(folder))
        for B, T in [(1, T) for T in CURVE] if args.curve else [(args.batch, args.tokens)]:
            shape = Shape(B=B, T=T)
            found = race(task | {"folder": folder, "shape": asdict(shape)}, names, args.steps, WARM)
            label = f"{args.method} C={shape.C} {shape.layers} layers V={shape.V} B={B} T={T} bfloat16"
            details(title.add(row(label, B * T, found, shape.flops()) | {"absent": absent}))
    return title.done()


if __name__ == "__main__":
    main()
