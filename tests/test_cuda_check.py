"""tools/cuda_check.py on text that nvcc 13.0 has printed: no compiler runs here."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("cuda_check", TOOLS / "cuda_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cuda_check"]


CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9llamakern4cuda11rope_kernelIfLi4ELb0EEEvNS_4RopeIT_EE' for 'sm_90a'
ptxas info    : Function properties for _ZN9llamakern4cuda11rope_kernelIfLi4ELb0EEEvNS_4RopeIT_EE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
ptxas info    : Compile time = 24.565 ms
"""
SPILLING = """\
ptxas info    : Compiling entry function '_ZN9llamakern4cuda15rms_norm_kernelILb1EffEEvNS_7RmsNormIT0_T1_EE' for 'sm_80'
ptxas info    : Function properties for _ZN9llamakern4cuda15rms_norm_kernelILb1EffEEvNS_7RmsNormIT0_T1_EE
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 128 bytes smem, 472 bytes cmem[0]
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_parse_reads_every_number(check):
    (rope,) = check.parse(CLEAN)
    assert (rope.arch, rope.registers, rope.stack, rope.stores, rope.shared) == ("sm_90a", 28, 0, 0, 0)
    norm, helper = check.parse(SPILLING)
    assert (norm.arch, norm.registers, norm.stack, norm.stores, norm.loads, norm.shared) == (
        "sm_80", 40, 16, 12, 20, 128,
    )  # fmt: skip
    assert (helper.symbol, helper.stack) == ("helper", 8)


def test_one_kernel_on_two_architectures_is_two(check):
    assert [k.arch for k in check.parse(CLEAN + CLEAN.replace("sm_90a", "sm_80"))] == ["sm_90a", "sm_80"]


def verdict(check, tmp_path, text, source="", status=0):
    file = tmp_path / "x_cuda.cu"
    file.write_text(source)
    return check.check_file(file, status, text)[1]


def test_a_clean_file_has_no_fault(check, tmp_path):
    assert verdict(check, tmp_path, CLEAN) == []


def test_a_spill_or_a_stack_frame_is_a_fault(check, tmp_path):
    faults = verdict(check, tmp_path, SPILLING)
    assert len(faults) == 2
    assert "rms_norm_kernel" in faults[0]
    assert "16 bytes of stack, 12 bytes spilled" in faults[0]
    assert "helper for sm_80: 8 bytes of stack" in faults[1]


def test_a_reason_excuses_its_kernel_only(check, tmp_path):
    if check.demangled(["_Z1fv"]) == ["_Z1fv"]:
        pytest.skip("c++filt is missing")
    source = "  // cuda-check: rms_norm_kernel may spill: the second half of a row waits in local memory\n"
    faults = verdict(check, tmp_path, SPILLING, source)
    assert [fault.split()[0] for fault in faults] == ["helper"]
    (fault,) = verdict(check, tmp_path, CLEAN, source)
    assert fault == "rms_norm_kernel does not spill: remove its reason"


def test_a_file_that_does_not_compile_is_a_fault(check, tmp_path):
    (fault,) = verdict(check, tmp_path, "x_cuda.cu(3): error: expected a ';'", status=2)
    assert fault.startswith("x_cuda.cu does not compile:")


def test_the_table_and_the_exit_status(check, tmp_path, monkeypatch, capsys):
    file = tmp_path / "x_cuda.cu"
    file.write_text("")
    monkeypatch.setattr(check, "find_nvcc", lambda: Path("nvcc"))
    for text, status in ((CLEAN, 0), (SPILLING, 1)):
        monkeypatch.setattr(check, "compile_one", lambda nvcc, file, text=text: (0, text))
        assert check.main([str(file)]) == status
    printed = capsys.readouterr()
    assert "registers" in printed.out
    assert " 28 " in printed.out
    assert "without a reason" in printed.err


def test_names_are_shortened(check):
    name = "void llamakern::cuda::rope_kernel<llamakern::bfloat16, (int)8, (bool)1>(llamakern::Rope<float>)"
    assert check.shortened(name) == "rope_kernel<bfloat16, 8, true>"


def test_without_a_compiler_it_says_so(check, monkeypatch, capsys):
    monkeypatch.setattr(check, "find_nvcc", lambda: None)
    assert check.main([]) == 0
    assert "nothing was checked" in capsys.readouterr().out


def test_the_hosts_half_is_compiled_too(check, tmp_path):
    """Where nvcc is: what its rewriting makes wrong for the C++ compiler fails, though the kernels compile."""
    if check.find_nvcc() is None:
        pytest.skip("needs nvcc")
    file = tmp_path / "x_cuda.cu"
    file.write_text(
        "__global__ void k(float* p) { *p = 1; }\n#ifndef __CUDA_ARCH__\nint host() { return missing; }\n#endif\n"
    )
    status, text = check.compile_one(check.find_nvcc(), file)
    assert status != 0
    assert "missing" in text
