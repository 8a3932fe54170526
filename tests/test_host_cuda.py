"""The host harness for CUDA kernels (host_cuda/): right kernels pass and equal float64, each kind of bug is named."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests/host_cuda"
PROOF = ROOT / "build/host_cuda/proof"
BUGS = (SOURCES / "bugs.cu").read_text().splitlines()
ERRS = "(2, 0, 0)", "(37, 0, 0)"  # the block and thread that err where nothing else is said

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("g++", "make", "addr2line"))), reason="needs g++, make and binutils"
)

# The kind of report, who errs, and what the report says of it.
SEEDED = {
    "unwritten_shared": ("unwritten", ERRS, r"reads tile \+ 252, which no thread of this block has written so far"),
    "shared_index": ("out of bounds", ERRS, r"index 64 of an array 'float \[64\]'"),
    "shared_past_end": ("out of bounds", ERRS, r"writes 4 bytes, 0 bytes past the end of tile \[240 bytes of shared\]"),
    "dynamic_past_end": ("out of bounds", ERRS, r"writes 4 bytes, 0 bytes past the end of dynamic shared memory .*"),
    "dynamic_too_small": ("misuse", ERRS, r"the kernel uses 260 bytes of dynamic shared memory, the launch gave 256"),
    "global_past_end": ("out of bounds", ERRS, r"reads 4 bytes, 0 bytes past the end of x \[768 bytes of global\]"),
    "global_before": ("out of bounds", ERRS, r"writes 4 bytes, 4 bytes before y \[768 bytes of global\]"),
    "unregistered": ("out of bounds", ERRS, r"writes 4 bytes, in no registered buffer"),
    "misaligned_vector": ("misaligned", ERRS, r"'const struct float4' at address .*, which is no multiple of 16"),
    "misaligned_copy": ("misaligned", ERRS, r"cp\.async of 16 bytes from .*"),
    "misaligned_row": ("misaligned", ERRS, r"reads 16 bytes at tile \+ 84, which is no multiple of 16"),
    "index_overflow": ("overflow", ERRS, r"16777216 \* 165 does not fit 'int'"),
    "missing_barrier": ("race", ("(2, 0, 0)", "(5, 0, 0)"), r"writes tile \+ 20, which thread \(37, 0, 0\) read"),
    "missing_second_barrier": (
        "race",
        ("(2, 0, 0)", "(5, 0, 0)"),
        r"writes tile \+ 20, which thread \(37, 0, 0\) read",
    ),
    "missing_warp_sync": ("race", ERRS, r"reads tile \+ 144, which thread \(36, 0, 0\) wrote"),
    "shuffle_is_no_sync": ("race", ERRS, r"reads tile \+ 144, which thread \(36, 0, 0\) wrote"),
    "blocks_collide": ("race", ERRS, r"writes y \+ 124, which block \(0, 0, 0\) thread \(31, 0, 0\) wrote"),
    "plain_meets_atomic": ("race", ERRS, r"writes y \+ 0, which block \(0, 0, 0\) thread \(5, 0, 0\) wrote"),
    "last_block<false>": ("race", ERRS, r"reads y \+ 0, which block \(0, 0, 0\) thread \(0, 0, 0\) wrote"),
    "barrier_counts_differ": ("misuse", ERRS, r"barrier 1: this thread expects 32 threads, others expect 64"),
    "divergent_warp": ("divergent warp", ERRS, r"lane 5 is at __shfl_xor_sync .*, lane 0 at __syncwarp .*"),
    "caller_not_in_mask": ("misuse", ERRS, r"__shfl_sync: mask 0xffffffdf does not name the calling lane 5"),
    "lane_not_in_mask": ("misuse", ("(2, 0, 0)", "(31, 0, 0)"), r"a shuffle asks lane 3, which is not in mask .*"),
    "copies<kWait>": ("too early", ERRS, r"reads tile \+ 404, where a copy by thread \(37, 0, 0\) has not been .*"),
    "copies<kEnoughWait>": (
        "too early",
        ERRS,
        r"reads tile \+ 404, where a copy by thread \(37, 0, 0\) has not been .*",
    ),
    "copies<kCommit>": ("too early", ERRS, r"reads tile \+ 404, where a copy by thread \(37, 0, 0\) has not been .*"),
    "copies<kBarrierAfterWait>": ("race", ERRS, r"reads tile \+ 276, which thread \(5, 0, 0\) wrote"),
    "mbarrier_not_made": ("unwritten", ERRS, r"updates barrier \+ 0, which no thread of this block has written so far"),
    "bulk_copy_unwaited": ("too early", ERRS, r"reads tile \+ 148, where a copy by thread \(0, 0, 0\) has not been .*"),
}

# Threads that wait for ever: the block, and each group of threads with its place.
STUCK = {
    "divergent_barrier": ("(0, 0, 0)", "63 threads from (0, 0, 0) to (63, 0, 0) wait at __syncthreads", "at"),
    "early_return": ("(2, 0, 0)", "37 threads from (0, 0, 0) to (36, 0, 0) wait at __syncthreads", "at"),
    "named_barrier_count": ("(2, 0, 0)", "64 threads from (0, 0, 0) to (63, 0, 0) wait at barrier 1", "at"),
    "bulk_copy_bytes": ("(2, 0, 0)", "64 threads from (0, 0, 0) to (63, 0, 0) wait at mbarrier_wait", "at"),
    "spins_for_ever": ("(2, 0, 0)", "1 thread, (37, 0, 0) in a loop of atomic or volatile accesses", "at"),
    "waits_for_a_flag": ("(2, 0, 0)", "1 thread, (37, 0, 0) in a loop of atomic or volatile accesses", "at"),
}


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """Runs the program of the tests' kernels, built with g++ alone."""
    subprocess.run(["make", "-s", "-j2", "-C", SOURCES], check=True)

    def run(*words, good=True, **settings):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HOST_CUDA_")} | settings
        result = subprocess.run([PROOF, *words], env=env, capture_output=True, text=True, timeout=120)
        assert (result.returncode == 0) == good, result.stdout + result.stderr
        return result

    return run


def lines_of(kernel, mark):
    """The lines of a kernel in bugs.cu that carry a mark."""
    start = next(i for i, line in enumerate(BUGS) if f" {kernel}(" in line and "__global__" in line)
    end = next(i for i in range(start, len(BUGS)) if BUGS[i] == "}")
    lines = [i + 1 for i in range(start, end) if re.search(rf"// .*\b{mark}\b", BUGS[i])]
    assert lines, f"{kernel} has no line marked {mark}"
    return lines


def places(kernel, mark):
    return "|".join(rf"{kernel}\S* bugs\.cu:{line}\b" for line in lines_of(kernel, mark))


@pytest.mark.parametrize("settings", [{}, {"HOST_CUDA_SEED": "1"}, {"HOST_CUDA_SEED": "7", "HOST_CUDA_THREADS": "8"}])
def test_right_kernels_equal_float64(proof, settings):
    lines = proof("check", **settings).stdout.splitlines()
    assert len(lines) >= 15
    assert all(line.startswith("ok ") for line in lines), "\n".join(lines)


@pytest.mark.parametrize("bug", SEEDED)
def test_bug_is_named_by_kernel_block_thread_and_line(proof, bug):
    kind, (block, thread), what = SEEDED[bug]
    kernel = bug.split("<")[0]
    report = proof("bug", bug, good=False).stdout
    first, who, said, *rest = report.splitlines()
    assert first == f"{kind} in {bug}"
    assert who == f"  block   {block}  thread {thread}"
    assert re.fullmatch("  what    " + what, said), report
    assert re.fullmatch(rf"  at      ([^:]* ptx\S*\.cuh:\d+ < )*({places(kernel, 'at')})", rest[-1]), report
    if kind in ("race", "too early"):
        assert re.fullmatch(rf"  there   ([^:]* ptx\S*\.cuh:\d+ < )*({places(kernel, 'there')})", rest[0]), report


@pytest.mark.parametrize("bug", STUCK)
def test_standstill_is_named_by_kernel_block_threads_and_line(proof, bug):
    block, group, mark = STUCK[bug]
    first, where, _, *groups = proof("bug", bug, good=False).stdout.splitlines()
    assert first == f"deadlock in {bug}"
    assert where == f"  block   {block}"
    assert any(re.fullmatch(rf"  {re.escape(group)}, (\S+ \S+ < )*({places(bug, mark)})", g) for g in groups), groups


def test_every_bug_is_tested():
    listed = set(re.findall(r"BUG\(([\w<>]+)\)", "\n".join(BUGS))) - {"name", "last_block<true>"}
    assert listed == SEEDED.keys() | STUCK.keys()


def test_last_block_may_read_what_others_fenced(proof):
    """write, __threadfence, atomic; the last one: atomic, __threadfence, __syncthreads, read."""
    assert proof("bug", "last_block<true>").stdout == ""


@pytest.mark.parametrize("seed", ["3", "12345"])
@pytest.mark.parametrize("bug", ["missing_barrier", "missing_warp_sync", "blocks_collide", "last_block<false>"])
def test_races_do_not_depend_on_the_order_of_threads(proof, bug, seed):
    report = proof("bug", bug, good=False, HOST_CUDA_SEED=seed).stdout
    assert report.startswith(f"race in {bug}\n"), report


def test_without_checks_nothing_is_reported(proof):
    assert proof("bug", "missing_barrier", HOST_CUDA_CHECKS="0").stdout == ""


def test_bank_conflicts_and_uncoalesced_access_are_counted_by_line(proof):
    marks = {
        (kind, i): numbers
        for i, line in enumerate((SOURCES / "traffic.cu").read_text().splitlines(), 1)
        for kind, *numbers in re.findall(r"// (banks|sectors) (\d+) (\d+) (\d+)", line)
    }
    assert len(marks) == 6
    report = proof("traffic", HOST_CUDA_REPORT="banks,coalescing").stderr
    found, kind = {}, None
    for line in report.splitlines():
        if not line.startswith("  "):
            kind = "banks" if line.startswith("bank conflicts") else "sectors"
            continue
        accesses, moved, least, at = re.fullmatch(
            r" +(\d+) +(\d+) \((\d+)\) .* traffic_kernel traffic.cu:(\d+)", line
        ).groups()
        found[kind, int(at)] = [accesses, moved, least]
    assert found == marks, report


def test_traffic_is_reported_only_on_request(proof):
    assert proof("traffic").stderr == ""
    assert "uncoalesced" not in proof("traffic", HOST_CUDA_REPORT="banks").stderr


def test_every_synchronisation_is_missed_when_it_is_left_out(proof):
    """Mutants: without any one barrier, wait, fence or arrival of the right kernels, the checks find something."""
    result = subprocess.run(
        [sys.executable, ROOT / "host_cuda/mutate.py", PROOF, "check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    *places, summary = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert summary == "0 not noticed"
    assert len(places) >= 30


def test_a_needless_synchronisation_is_named(proof):
    """The commands of mutate.py may be any: here one that never fails misses nothing."""
    result = subprocess.run(
        [sys.executable, ROOT / "host_cuda/mutate.py", "--only", "gemm.cu", "sh", "-c", f"{PROOF} check; true"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "NOT NOTICED" in result.stdout, result.stdout + result.stderr


def test_two_os_threads_launch_from_a_library_that_python_loaded(proof):
    """As in an extension module: the checks stay inside the library, reports name their lines, threads do not mix."""
    code = f"""
import ctypes, threading
lib = ctypes.CDLL("{PROOF.parent / "libproof.so"}")
failures, reports = [], []
def work(bug):
    text = ctypes.create_string_buffer(4096)
    for _ in range(10):
        found = lib.proof_bug(bug, text, 4096)
        reports.append((found, text.value.decode().splitlines()[0]))
    failures.append(lib.proof_check())
threads = [threading.Thread(target=work, args=(bug,)) for bug in (b"missing_barrier", b"global_past_end")]
for t in threads: t.start()
for t in threads: t.join()
assert failures == [0, 0], failures
assert set(reports) == {{(1, "race in missing_barrier"), (1, "out of bounds in global_past_end")}}, reports
assert len(reports) == 20
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_example_stands_alone_and_shows_its_bug(proof):
    """By its own Makefile; the harness's objects are those of the other tests."""

    def run(bug):
        command = ["make", "-s", "-C", ROOT / "host_cuda/example", "run", f"BUG={bug}", f"BUILD={PROOF.parent}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    right, wrong = run(0), run(1)
    assert right.returncode == 0, right.stdout + right.stderr
    assert right.stdout.startswith("row 0: ")
    source = (ROOT / "host_cuda/example/example.cu").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "= partial[0]" in text)
    assert wrong.returncode != 0
    assert wrong.stdout == (
        "unwritten in row_sum\n"
        "  block   (0, 0, 0)  thread (0, 0, 0)\n"
        "  what    reads partial + 4, which no thread of this block has written so far\n"
        f"  at      row_sum example.cu:{line}\n"
    )
