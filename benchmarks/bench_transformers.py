"""QLoRA in transformers' Trainer: with `patch`, without it, and over bitsandbytes as users run it today.

Each contestant runs in a process of its own, so that the peak of its memory is its own; they take turns, round by
round. All load the same random checkpoint, see the same tokens and start at the same adapters. At the end `verify`
compares one step of the patched model with one over bitsandbytes.
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
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch

import llamakern
from llamakern.bench.table import machine, write_table
from llamakern.nn import quantize_
from llamakern.runs import peak_memory_mb

CONTESTANTS = ("patched", "unpatched", "bitsandbytes", "bitsandbytes patched")
WARM = 2  # steps that are not timed


@dataclass
class Shape:
    """C width, FFN, layers, H and Hkv heads, V vocabulary; B sequences of T tokens in a step."""

    C: int = 1024
    FFN: int = 2816
    layers: int = 8
    H: int = 16
    Hkv: int = 4
    V: int = 32000
    B: int = 2
    T: int = 512

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def flops(self) -> int:
        """Of a step: two for each multiply-add of forward and dx; the frozen weights need no dw; LoRA is left out."""
        D, M = self.C // self.H, self.B * self.T
        linears = self.layers * self.C * (2 * self.C + 2 * self.Hkv * D + 3 * self.FFN) + self.C * self.V
        attention = self.layers * self.H * D * self.T  # q kᵀ and p v, causal: half of the scores
        return 4 * M * linears + 7 * M * attention  # attention's backward is five such products


SMALL = Shape(C=256, FFN=704, layers=4, H=8, Hkv=2, V=8000, B=2, T=128)


def write_checkpoint(shape: Shape, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.C, intermediate_size=shape.FFN, num_hidden_layers=shape.layers, vocab_size=shape.V,
        num_attention_heads=shape.H, num_key_value_heads=shape.Hkv, max_position_embeddings=shape.T,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make(name: str, folder: Path) -> torch.nn.Module:
    """The model of a contestant, with LoRA of rank 16 on all linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    loading = {"dtype": torch.bfloat16}
    if name.startswith("bitsandbytes"):
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        loading["quantization_config"] = BitsAndBytesConfig(**nf4)
    model = AutoModelForCausalLM.from_pretrained(folder, **loading)
    if not name.startswith("bitsandbytes"):
        quantize_(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    if name.endswith("patched") and name != "unpatched":
        llamakern.patch(model)
    return model.train()


def sequences(shape: Shape, n: int) -> list[dict]:
    """Random tokens, the low ones more often (Zipf's law), so that there is something to learn."""
    generator = torch.Generator().manual_seed(2)
    tokens = shape.V ** torch.rand(n, shape.T, generator=generator)
    return [{"input_ids": row, "labels": row} for row in (tokens.long() - 1).clamp(0, shape.V - 1)]


def child(name: str, shape: Shape, folder: Path, steps: int) -> dict:
    """Trains one contestant: seconds and loss of every step, and the peak of the memory while it trained."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seconds, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    class Recording(Trainer):
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    model = make(name, folder)
    settings = TrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=shape.B, max_steps=WARM + steps, learning_rate=1e-3,
        bf16=True, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", seed=3,
    )  # fmt: skip
    data = sequences(shape, shape.B * (WARM + steps))
    trainer = Recording(model, settings, train_dataset=data, callbacks=[Clock()])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    trainer.train()
    return {"seconds": seconds[WARM:], "losses": [loss.item() for loss in losses], "memory_mb": peak_memory_mb()}


def compare(shape: Shape, folder: Path) -> dict:
    """One step of the patched model against one over bitsandbytes, both with B of the adapters away from 0."""
    models = [make(name, folder) for name in ("bitsandbytes", "patched")]
    for model in models:
        for i, p in enumerate(p for name, p in model.named_parameters() if "lora_B" in name):
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(i))
    found = llamakern.verify(*models, torch.stack([row["input_ids"] for row in sequences(shape, shape.B)]))
    return {"ok": found.ok, "table": str(found), "shares": {name: row.share for name, row in found.rows.items()}}


def in_child(task: str, shape: Shape, folder: Path, steps: int) -> dict:
    arguments = [sys.executable, __file__, "--child", task, "--folder", folder, "--shape", json.dumps(asdict(shape))]
    result = subprocess.run([*arguments, "--steps", str(steps)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{task} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def summary(runs: list[dict], shape: Shape) -> dict:
    seconds = statistics.median(t for run in runs for t in run["seconds"])
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": shape.B * shape.T / seconds,
        "memory_mb": statistics.median(run["memory_mb"] for run in runs),
        "losses": runs[0]["losses"],
    }


def race(shape: Shape, folder: Path, names: list[str], rounds: int, steps: int) -> dict[str, dict]:
    runs = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(in_child(name, shape, folder, steps))
            print(f"  {name}: {statistics.median(runs[name][-1]['seconds']):.3f} s a step", file=sys.stderr)
    return {name: summary(some, shape) for name, some in runs.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model that takes a minute, not ten")
    parser.add_argument("--steps", type=int, default=6, help=f"timed steps of a run, after {WARM} others")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    parser.add_argument("--only", choices=CONTESTANTS, action="append", help="this contestant, may be repeated")
    parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.child:
        shape = Shape(**args.shape)
        task = compare(shape, args.folder) if args.child == "verify" else None
        print(json.dumps(task or child(args.child, shape, args.folder, args.steps)))
        return
    shape = SMALL if args.small else Shape()
    print(f"QLoRA step in transformers' Trainer\n{machine()}\n{shape}")
    wanted, missing = args.only or CONTESTANTS, importlib.util.find_spec("bitsandbytes") is None
    absent = {name: "not installed" for name in wanted if missing and name.startswith("bitsandbytes")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(shape, folder)
        found = race(shape, folder, [name for name in wanted if name not in absent], args.rounds, args.steps)
        checked = {"table": "absent"} if absent else in_child("verify", shape, folder, args.steps)
    ours = next(iter(found.values()))["ms"]
    for name, run in found.items():
        losses = f"loss {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f}"
        speed = f"{run['ms']:9.1f} ms ({run['ms'] / ours:5.2f}x) {run['tokens_per_s']:8.0f} tokens/s"
        print(f"{name:21s} {speed} {run['memory_mb']:7.0f} MB  {losses}")
    for name, why in absent.items():
        print(f"{name:21s} absent ({why})")
    print(f"\nverify: bitsandbytes, and patched\n{checked['table']}")
    if args.json:
        label = f"QLoRA C={shape.C} {shape.layers} layers V={shape.V} B={shape.B} T={shape.T} bfloat16"
        row = {"shape": label, "ms": {name: run["ms"] for name, run in found.items()}}
        row |= {"absent": absent, "flops": shape.flops(), "bytes": 0, "error": None, "runs": found, "verify": checked}
        write_table(args.json, {"title": "transformers", "axis": "", "machine": machine(), "rows": [row]})


if __name__ == "__main__":
    main()
