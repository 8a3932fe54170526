"""One build runs on every machine: each instruction set stays in its own namespace and can be chosen by name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llamakern
from llamakern import _C, ops

LIBRARY = Path(llamakern.__file__).parent / "libllamakern_ops.so"
NAMESPACE = re.compile(r"llamakern(?:::|\d+)(avx2|avx512bf16|avx512|neon)(?![a-z])")  # demangled, or too long for that
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
AVX = re.compile(r"\t(v(?!err|erw)\w+) ")  # every AVX instruction begins with v
AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")  # what only the EVEX encoding can say


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def wide_functions():
    """wide(place, kind): [function: its first such line] in a namespace or in "common"; kind is "avx" or "avx512"."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "file format elf64-x86-64" not in listing:
        pytest.skip("only x86 has several instruction sets")
    found, seen, place, name = {}, set(), "common", ""
    for line in listing.splitlines():
        if header := FUNCTION.match(line):
            name = header[1]
            inside = NAMESPACE.search(name)
            place = inside[1] if inside else "common"
            seen.add(place)
        else:
            for kind, pattern in (("avx", AVX), ("avx512", AVX512)):
                if pattern.search(line):
                    found.setdefault((place, kind), {}).setdefault(name, line.strip())
    assert seen == {"common", "avx2", "avx512", "avx512bf16"}, seen
    return lambda place, kind: [f"{name}: {line}" for name, line in found.get((place, kind), {}).items()]


def test_common_code_runs_on_any_machine(wide_functions):
    assert wide_functions("common", "avx") == []
    assert wide_functions("common", "avx512") == []


def test_avx2_code_holds_no_avx512(wide_functions):
    assert wide_functions("avx2", "avx")
    assert wide_functions("avx2", "avx512") == []


def test_wide_code_is_where_it_belongs(wide_functions):
    assert wide_functions("avx512", "avx512")
    assert wide_functions("avx512bf16", "avx512")


@pytest.mark.parametrize("name", _C.supported_isas())
def test_environment_forces_a_set(name):
    code = (
        "import torch\n"
        "from llamakern import _C, ops\n"
        "x = torch.ones(3, 40)\n"
        "assert torch.allclose(ops.rms_norm(x, None, eps=0.0), x)\n"
        "print(_C.isa())"
    )
    result = run_python(code, LLAMAKERN_ISA=name)
    assert result.stdout.strip() == name, result.stderr


def test_unknown_set_in_the_environment():
    """The error comes at first use, as ValueError, through torch's dispatcher too."""
    code = (
        "import torch\n"
        "from llamakern import _C, ops\n"
        "for use in (_C.isa, lambda: ops.swiglu(torch.ones(2), torch.ones(2))):\n"
        "    try:\n"
        "        use()\n"
        "    except ValueError as error:\n"
        "        print(error)"
    )
    result = run_python(code, LLAMAKERN_ISA="nonsense")
    names = ", ".join(_C.supported_isas())
    want = f"llamakern: LLAMAKERN_ISA must be one of {names} on this machine, got nonsense"
    assert result.stdout.splitlines() == [want, want], result.stderr


def test_use_isa_refuses_unknown_names():
    before = _C.isa()
    with pytest.raises(ValueError, match=r"name must be one of .* on this machine, got sse9"):
        _C.use_isa("sse9")
    assert _C.isa() == before


def test_sets_agree():
    """Different instructions, the same function: results differ by rounding only."""
    x, w = torch.randn(20, 300), torch.randn(300)
    before, results = _C.isa(), []
    try:
        for name in _C.supported_isas():
            _C.use_isa(name)
            results.append(ops.swiglu(ops.rms_norm(x, w, eps=1e-5), x))
    finally:
        _C.use_isa(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_build_facts():
    assert _C.isa() in _C.supported_isas()
    assert _C.compiler
    assert _C.cuda_built is (_C.cuda_archs is not None)


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert _C.threads() == 3
    finally:
        torch.set_num_threads(before)
