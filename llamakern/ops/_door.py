"""The front door: how a C++ op becomes differentiable and stays cheap where no gradient is wanted.

Each op has two names in C++ with one kernel. `torch.ops.llamakern.<op>` carries autograd, for torch.ops, export and
opcheck users. `_<op>` carries none; the public function calls it directly, or through an autograd.Function where a
gradient is wanted, because torch's own `register_autograd` costs microseconds even where none is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("llamakern", "IMPL")


def differentiable(
    name: str, *, fake: Callable, setup_context: Callable, backward: Callable
) -> tuple[Callable, Callable]:
    """Gives the op its shapes and its gradient. Returns (raw op, the same op recording a gradient).

    fake(*args) returns empty outputs; setup_context(ctx, inputs, output) and backward(ctx, *grads) are those of
    torch.autograd.Function, with one gradient for each argument of the op.
    """
    register_shapes(name, fake)
    register_shapes(name, fake, prefix="_")
    torch.library.register_autograd(f"llamakern::{name}", backward, setup_context=setup_context)
    raw = getattr(torch.ops.llamakern, f"_{name}").default
    LIBRARY.impl(f"_{name}", torch.library.fallthrough_kernel, "Autograd")  # else each call asks whether one is there

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = raw(*args)
            setup_context(ctx, args, output)
            return output

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return raw(*args)

    Transformable.setup_context = staticmethod(setup_context)
    Recorded.backward = Transformable.backward = staticmethod(backward)

    # Past Function.apply's own Python, which looks at each argument for a torch.func wrapper and costs 1 to 2 us.
    record = super(torch.autograd.Function, Recorded).apply
    traceable = getattr(torch.ops.llamakern, name).default

    def recorded(*args):
        if torch.compiler.is_compiling():  # which refuses a Function that is given one tensor twice, as in q, k, k
            return traceable(*args)
        # torch.func asks for the second form, which costs 5 us more: it binds the arguments by signature at each call.
        transformed = torch._C._are_functorch_transforms_active()
        return Transformable.apply(*args) if transformed else record(*args)

    return raw, recorded


def backward_op(name: str, *, fake: Callable) -> Callable:
    """Gives a backward op its shapes. Its own gradient cannot be taken."""
    register_shapes(name, fake)
    return once(name, getattr(torch.ops.llamakern, name).default)


def once(name: str, fn: Callable) -> Callable:
    """fn, a step of a backward: where its own gradient would be recorded, taking that gradient raises RuntimeError."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return fn(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"{name}: double backward is not supported")

    def call(*args):
        return (Once.apply if wants_grad(*(a for a in args if isinstance(a, Tensor))) else fn)(*args)

    return call


def plain_op(name: str, *, fake: Callable) -> Callable:
    """Gives an op without gradient its shapes."""
    register_shapes(name, fake)
    return getattr(torch.ops.llamakern, name).default


def register_shapes(name: str, fake: Callable, prefix: str = "") -> None:
    """Registers the fake of an op, for tensors of one device: beside a meta tensor, real ones would go uncomputed."""

    def checked(*args):
        devices = {str(a.device) for a in args if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{name}: tensors must be on one device, got {' and '.join(sorted(devices))}")
        return fake(*args)

    torch.library.register_fake(f"llamakern::{prefix}{name}")(checked)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether the call must be recorded: for a backward, or to refuse a forward-mode tangent, never to lose it."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of linears and attention on x's device, or None outside autocast."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, in a fifth of the time of the questions below
        return None
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # torch refuses to answer for meta
    return torch.get_autocast_dtype(device) if on else None
