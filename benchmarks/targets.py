"""What the CPU engine is to reach, each with the row that proves it. `report.py FOLDER --targets` says what it does.

A target bounds one measure of a row, from below:

    share            of the roof that bounds the work, measured in the same turns
    times            of ours that a rival takes; of several rivals the smallest counts
    memory           of ours that a rival holds at its peak, likewise
    smaller          how many times as much memory dense experts take as packed ones

or from above:

    slowdown         times of ours that another form of ours takes
    loading_mb       the peak of our memory while the model loads, in MiB
    memory_mb        the peak in a step
"""

from typing import NamedTuple


class Target(NamedTuple):
    """table: a result file's name without .json, in the folder of its instruction set if that is not the best."""

    table: str
    row: str
    measure: str
    bound: float
    rivals: tuple[str, ...] = ()


LAYERS = ("llama-7b q_proj 4096x4096", "llama-7b up_proj 11008x4096")
MIXTURES = ("mixtral/2", "llama4-scout/2")
DECODE = ("llama3-8b S=8192", "llama-7b S=2048", "llama3.2-1b S=4096 B=4", "one kv head S=16384")
EVAL = ("bitsandbytes eval",)
BITSANDBYTES = ("bitsandbytes eval", "bitsandbytes training")
LLAMA_CPP = ("llama.cpp", "llama.cpp flash")
PEFT = ("as PEFT sets it up", "autocast", "bfloat16 adapters")  # transformers + PEFT, over bitsandbytes for qlora
TRAIN = "C=1024 8 layers V=32000 B=2 T=512 bfloat16"
LARGE = "qlora llama3-8b double-quantised, bfloat16 head, checkpointed T=512 bfloat16"


def attention() -> list[Target]:
    long = "llama3-8b T=2048"
    return [
        Target("attention", f"{long} bfloat16 forward", "times", 5.0, ("torch",)),
        Target("attention", f"{long} bfloat16 forward", "share", 0.75),
        Target("attention_curve", "llama3-8b/4 T=16384 forward", "share", 0.75),
        Target("attention", "llama3-8b T=512 bfloat16 forward", "share", 0.65),
        Target("attention", f"{long} bfloat16 backward", "times", 3.0, ("torch",)),
        Target("attention", f"{long} bfloat16 backward", "share", 0.70),
        *(Target("attention", f"{long} float32 {way}", "times", 2.4, ("torch",)) for way in ("forward", "backward")),
        *(Target("attention", f"{long} float32 {way}", "share", 0.70) for way in ("forward", "backward")),
        *(Target("attention", f"{name} bfloat16 decode", "share", 0.85) for name in DECODE),
        *(Target("avx2/attention", f"{long} {dtype} forward", "share", 0.60) for dtype in ("float32", "bfloat16")),
    ]


def linears(layer: str) -> list[Target]:
    return [
        Target("nf4", f"{layer} M=1 bfloat16", "share", 0.90),
        Target("nf4", f"{layer} M=1 bfloat16", "times", 1.0, EVAL),
        Target("nf4", f"{layer} M=16 bfloat16", "times", 1.25, EVAL),
        Target("nf4", f"{layer} M=16 bfloat16", "times", 1.7, ("dense",)),
        Target("nf4", f"{layer} M=64 bfloat16", "times", 1.2, ("dense",)),
        Target("nf4", f"{layer} M=64 bfloat16", "times", 1.4, BITSANDBYTES),
        Target("nf4", f"{layer} M=512 bfloat16", "times", 1.0, ("dense",)),
        Target("nf4", f"{layer} M=512 bfloat16", "times", 1.4, BITSANDBYTES),
        Target("nf4", f"{layer} M=512 bfloat16 dx", "times", 1.1, ("dense",)),
        Target("avx2/nf4", f"{layer} M=512 bfloat16", "share", 0.75),
    ]


def experts(name: str, M: int) -> list[Target]:
    rows = [f"{name} M={M} bfloat16{kind}" for kind in ("", " dx", " training")]
    return [
        *(Target("moe", row, "times", 2.0, ("transformers",)) for row in rows),
        *(Target("moe", row, "slowdown", 1 / 0.85, ("ours NF4",)) for row in rows[:2]),
    ]


def lora(M: int, cost: float) -> Target:
    return Target("lora", f"{LAYERS[0]} nf4 M={M} bfloat16", "times", 1 / (1 + cost), ("without LoRA",))


TARGETS = [
    *attention(),
    *(target for layer in LAYERS for target in linears(layer)),
    lora(16, 0.05),
    lora(64, 0.025),
    lora(512, 0.025),
    *(target for name in MIXTURES for M in (1, 64, 512, 2048) for target in experts(name, M)),
    *(Target("moe", f"{name} M=64 bfloat16", "smaller", 3.5) for name in MIXTURES),
    Target("generate_llama_cpp", "1.1B decode prompt=512", "times", 1.3, LLAMA_CPP),
    Target("generate_llama_cpp", "1.1B prefill prompt=512", "times", 1.6, LLAMA_CPP),
    Target("train_qlora", f"qlora {TRAIN}", "times", 2.5, PEFT),
    Target("train_qlora", f"qlora {TRAIN}", "memory", 2.0, PEFT),
    Target("train_lora", f"lora {TRAIN}", "times", 2.5, PEFT),
    Target("train_adapter", f"adapter {TRAIN}", "times", 2.0, PEFT[:2]),
    Target("train_adapter", f"adapter {TRAIN}", "times", 1 / 1.02, ("without the method",)),
    Target("train_excitor", f"excitor {TRAIN}", "times", 1 / 1.04, ("without the method",)),
    Target("train_llama3-8b", LARGE, "loading_mb", 6 * 1024),
    Target("train_llama3-8b", LARGE, "memory_mb", 8 * 1024),
]
