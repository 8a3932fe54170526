"""The house keeps its own plan: every room has all its doors, every wall stands, every public op says what it means."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from llamakern import ops

ROOT = Path(__file__).parent.parent
ROOMS = sorted(d.name for d in (ROOT / "csrc").iterdir() if d.is_dir() and d.name != "common")
OPS = sorted(name for name, fn in vars(ops).items() if inspect.isfunction(fn))
FOLDERS = ("csrc", "bindings", "host_cuda", "llamakern", "tests", "benchmarks", "tools")
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py"}
SOURCES = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.*") if p.suffix in SUFFIXES]


@pytest.mark.parametrize("room", ROOMS)
def test_room_has_every_door(room):
    doors = [
        f"csrc/{room}/{room}.h",
        f"csrc/{room}/{room}_cpu.cpp",
        f"bindings/{room}.cpp",
        f"llamakern/ops/{room}.py",
        f"tests/test_{room}.py",
        f"benchmarks/bench_{room}.py",
    ]
    missing = [door for door in doors if not (ROOT / door).exists()]
    assert not missing, f"room {room!r} lacks {missing}"


def offenders(folder, pattern):
    return [
        f"{p.relative_to(ROOT)}:{i}"
        for p in SOURCES
        if p.is_relative_to(ROOT / folder)
        for i, line in enumerate(p.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_csrc_knows_no_torch():
    assert not offenders("csrc", r'#include [<"](torch|ATen|c10|pybind11|Python\.h)')


def test_bindings_know_no_math():
    assert not offenders("bindings", r"#include <(cmath|immintrin\.h|arm_neon\.h|omp\.h)>|parallel_for")[1:], (
        "only module.cpp may ask OpenMP for its thread count"
    )


def test_llamakern_knows_no_pointers():
    """A storage's address may tell whether two tensors share it; no other address is taken."""
    assert not offenders("llamakern", r"(?<!storage)(?<!storage\(\))\.data_ptr\(|\bctypes\b")


def test_long_files_say_why():
    """Over 400 lines needs a reason in the first lines: a sentence that holds the word 'lines'."""
    long = [p for p in SOURCES if len(p.read_text().splitlines()) > 400]
    assert not [str(p.relative_to(ROOT)) for p in long if " lines" not in "\n".join(p.read_text().splitlines()[:15])]


@pytest.mark.parametrize("name", OPS)
def test_public_op_has_reference_and_docstring(name):
    module = importlib.import_module(getattr(ops, name).__module__)
    reference = f"{name[:-1]}_reference_" if name.endswith("_") else f"{name}_reference"
    assert hasattr(module, reference), f"{name} lacks {reference}"
    assert "Raises" in (getattr(ops, name).__doc__ or ""), f"{name}'s docstring does not say what it raises"


def test_every_raw_op_has_cpu_and_fake_kernels():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("llamakern::")]
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name
        assert torch._library.utils.has_fake_kernel(torch._library.utils.lookup_op(name)), name


def test_every_front_door_has_a_differentiable_twin():
    """`_op` serves the cheap front door; torch.ops.llamakern.op carries the same kernel with autograd."""
    names = set(torch._C._dispatch_get_all_op_names())
    doors = [n for n in names if n.startswith("llamakern::_")]
    for door in doors:
        twin = door.replace("::_", "::")
        assert twin in names, door
        assert torch._C._dispatch_has_kernel_for_dispatch_key(twin, "Autograd"), twin


PUBLIC = {
    "llamakern": (
        "Llama", "Llama.forward", "Llama.from_pretrained", "Llama.loss", "Llama.new_cache", "Llama.save_pretrained",
        "LlamaConfig", "TrainConfig", "Trainer", "check_training", "generate", "load_tokenizer", "patch", "quantize_",
        "unpatch", "verify",
    ),
    "llamakern.nn": ("LoRALinear", "MoE", "NF4Linear", "RMSNorm"),
    "llamakern.peft": (
        "AdapterConfig", "AdapterV2Config", "ExcitorConfig", "FullConfig", "LoRAConfig", "Method.attach", "Parts",
        "PromptConfig", "activate", "active", "adapters", "apply", "count_trainable",
        "find_method", "load", "merge", "merge_report", "register", "remove", "save",
    ),
}  # fmt: skip


def signature(fn):
    return str(inspect.signature(fn)).replace("torch.Tensor", "Tensor")


def test_public_signatures_are_fixed():
    """Others write against these. A change here is a change of the contract: update the file on purpose."""
    snapshot = json.loads((Path(__file__).parent / "public_api.json").read_text())
    now = {f"llamakern.ops.{name}": signature(getattr(ops, name)) for name in OPS}
    for module, names in PUBLIC.items():
        now |= {f"{module}.{name}": signature(attrgetter(name)(importlib.import_module(module))) for name in names}
    assert now == snapshot


def test_import_is_quiet_and_light():
    """No optional package is imported unless asked, and nothing opens a socket."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import llamakern\n"
        "heavy = {'transformers', 'peft', 'bitsandbytes', 'matplotlib', 'pytest', 'hypothesis'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
