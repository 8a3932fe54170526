"""How close is close: no worse than PyTorch itself at the same dtype, with float64 as the judge.

Two gates, because each is blind to something:
  worst element <= 2.0x eager's worst    catches a wrong row, a missed tail, a race
  mean error    <= 1.5x eager's mean     catches a small lean everywhere, e.g. truncating where we should round
"""

import os
from pathlib import Path

import pytest
import torch

# Where tensors are made: LLAMAKERN_TEST_DEVICE=cuda runs the room tests on a GPU, "pretended" on one that is not there.
PRETENDED = os.environ.get("LLAMAKERN_TEST_DEVICE") == "pretended"
DEVICE = "cuda" if PRETENDED else os.environ.get("LLAMAKERN_TEST_DEVICE", "cpu")


def skip_unread(message):
    """Skips a test of values that are refused, on a GPU: the host does not wait to look at them there."""
    if DEVICE != "cpu" and "must lie in" in message:
        pytest.skip("values on a GPU are taken as they are")


def need_memory(gigabytes):
    """Skips the test where the machine, or the GPU under test, has less memory free."""
    if DEVICE != "cpu":
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of the GPU's memory, found {free:.1f}")
        return
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = {name: int(rest.split()[0]) / 1e6 for name, rest in (line.split(":") for line in lines)}.get(
        "MemAvailable", 0
    )
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, found {free:.1f}")


def assert_as_good_as(name, ours, eager, truth, floor=1e-6):
    """ours and eager are results at one precision, truth is float64's. `floor` is relative to the largest truth."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, want {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, want {eager.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: has inf or nan"
    if truth.numel() == 0:
        return
    error, bar = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    slack = floor * truth.abs().max()
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= 2.0 * bar.max() + slack, f"{name}: error {error.max():.2e} at {worst}, eager {bar.max():.2e}"
    assert error.mean() <= 1.5 * bar.mean() + slack, f"{name}: mean error {error.mean():.2e}, eager {bar.mean():.2e}"


def uneven(like):
    """An upstream gradient that differs in every element: a constant one hides transposed and dropped terms."""
    n = like.numel()
    i = torch.arange(n, dtype=torch.float64)
    wave = torch.cos(i * 0.7) + 2 * i / max(n, 1) - int(n > 1)  # 1, not 0, for a single number
    return wave.reshape(like.shape).to(like)


def outputs_and_gradients(fn, inputs, *, wide=False):
    """Runs fn(*inputs), then its backward with uneven gradients; in float64 if `wide`.

    Returns {"out0": ..., "d0": ...}: every output, and the gradient of every floating-point input that requires one.
    """
    inputs = [
        t.detach().to(torch.float64 if wide else t.dtype).requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for t in inputs
    ]
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = {i: t for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.requires_grad}
    graph = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad(graph, list(leaves.values()), [uneven(o) for o in graph]) if leaves else ()
    named = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"d{i}": g for i, g in zip(leaves, grads, strict=True)}


def check_against_reference(op, reference, inputs, floor=1e-6):
    """op's outputs and gradients for `inputs` must be as good as the reference's at the same dtype."""
    ours = outputs_and_gradients(op, inputs)
    eager = outputs_and_gradients(reference, inputs)
    truth = outputs_and_gradients(reference, inputs, wide=True)
    for name in truth:
        assert_as_good_as(name, ours[name], eager[name], truth[name], floor)


def check_float16_range(op, naive, inputs, rtol=2e-3):
    """Inputs whose results fit float16 while something on the way does not: ours are right, and naive's are not.

    op and naive take float16; the truth is naive in float64.
    """

    def close(result, want):
        slack = rtol * (want.abs() + want.abs().max())
        return bool(((result.double() - want).abs() <= slack).all())  # false for nan

    ours, plain = outputs_and_gradients(op, inputs), outputs_and_gradients(naive, inputs)
    truth = outputs_and_gradients(naive, inputs, wide=True)
    for name, want in truth.items():
        assert want.abs().max() <= 65504, f"{name}: beyond float16 itself"
        assert close(ours[name], want), (
            f"{name}: error {(ours[name].double() - want).abs().max()} of {want.abs().max()}"
        )
    assert not all(close(plain[name], want) for name, want in truth.items()), "nothing leaves float16's range"


def assert_same_bits(a, b, name=""):
    """Equal in every bit, -0.0 and 0.0 counted as different."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name}: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
    assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), f"{name}: bits differ"


def check_thread_counts(op, inputs):
    """Outputs and gradients have equal bits with 1, 2 and 7 threads, and in a second run."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7, 7):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(op, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, first in results[0].items():
            assert_same_bits(first, other[name], name)
