"""Other people's code in its best mode. What is not installed is absent, and the table says so."""

import copy
import importlib
import importlib.util
from collections.abc import Callable

import torch

from llamakern.bench.clock import Rotating, on_gpu
from llamakern.ops.nf4 import large_pages_


def in_large_pages(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself, moved into large pages as those of a loaded model are: pages decide no race."""
    large_pages_(weight)
    return weight


def imported(name: str):
    """The module, or why it cannot be had."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        return "not installed"
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel for another CUDA, or for another torch
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def liger(name: str, adapt: Callable = lambda fn: fn) -> dict[str, Callable | str]:
    """Liger's op on a GPU, where its Triton kernels run: {"Liger": adapt(op), or why it is absent}. Empty on a CPU."""
    if not on_gpu():
        return {}
    module = imported("liger_kernel.transformers.functional")
    return {"Liger": module if isinstance(module, str) else adapt(getattr(module, f"liger_{name}"))}


def bitsandbytes_layers(N: int, K: int, dtype: torch.dtype, *, training: bool) -> Rotating | str:
    """NF4 linears of bitsandbytes with random weights, or why there are none.

    In eval mode it repacks the weight at its first call, for a kernel that only runs forward; while it trains, it
    dequantises the whole weight at each call.
    """
    bnb = imported("bitsandbytes")
    if isinstance(bnb, str):
        return bnb
    knobs = {"compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": False}
    layer = bnb.nn.Linear4bit(K, N, bias=False, device="meta", **knobs)
    weight = torch.empty(N, K, dtype=dtype).normal_(std=0.02)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to(torch.get_default_device()).train(training)
    layers = Rotating(lambda: copy.deepcopy(layer), bytes_each=N * K * 9 // 16)
    with torch.no_grad():
        for each in layers.values:
            each(torch.zeros(1, K, dtype=dtype))
            in_large_pages(each.weight.data)
    return layers


def forward(layers: Rotating | str, x: torch.Tensor):
    """A contestant: y."""
    if isinstance(layers, str):
        return layers

    def run():
        with torch.no_grad():
            return layers()(x)

    return run


def backward(layers: Rotating | str, x: torch.Tensor, dy: torch.Tensor):
    """A contestant: dx alone, from graphs that were recorded before."""
    if isinstance(layers, str):
        return layers
    x = x.detach().requires_grad_()
    graphs = [layer(x) for layer in layers.values]

    def run():
        layers()
        return torch.autograd.grad(graphs[layers.next], x, dy, retain_graph=True)

    return run
