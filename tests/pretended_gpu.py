"""A GPU that is not there: tensors that say "cuda" and hold theirs on the CPU, where the ops compute them.

What a GPU would refuse is refused: tensors of two devices in one op, a random generator of the wrong one. Within
`must_not_wait`, so is whatever makes the host wait for the device or brings values to it, as torch does while it
captures a CUDA graph. So every line of Python that is meant for a GPU runs once where there is none.
"""

import contextlib
import time
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
WAITS = {  # the host needs a value, or as many elements as values say
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.repeat_interleave,
    aten._unique2, aten.unique_dim, aten.bincount,
}  # fmt: skip
MIXES = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
UNDISPATCHED = {torch.Tensor.tolist, torch.Tensor.new_tensor, torch.unravel_index}
waiting_is_refused = False


class OnGpu(torch.Tensor):
    """Is on "meta" for torch's own C++, so that autograd asks no driver for a stream."""

    @staticmethod
    def __new__(cls, held):
        knobs = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **knobs)
        wrapper.held = held
        return wrapper

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnGpu({self.held!r})"

    def __format__(self, form):
        return format(self.held, form)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, dict(kwargs or {}))


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def regained(t):
    """Tensors that torch's C++ made beside ours are plain meta: zeros where autograd has no gradient for an output."""
    if isinstance(t, OnGpu) or t.device.type != "meta":
        return t
    if t.dim() == 0:
        raise NotImplementedError("the pretended GPU lost a number that torch made a tensor of")
    return OnGpu(torch.zeros_like(t, device="cpu"))


def dispatch(op, args, kwargs):
    """One op, computed on what its tensors hold."""
    args, kwargs = tree_map_only(torch.Tensor, regained, (args, kwargs))
    packet = getattr(op, "overloadpacket", op)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    stray = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
    if stray and packet not in MIXES:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, found cuda:0 and cpu")
    to_host = packet is aten._to_copy and kwargs.get("device") is not None and kwargs["device"].type == "cpu"
    from_host = packet in MIXES and bool(stray)
    masks = packet is aten.index and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if waiting_is_refused and (packet in WAITS or to_host or from_host or masks):
        raise RuntimeError(f"{op}: makes the host wait for the GPU")
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs["device"] = "cpu"
    held_args, held_kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    result = op(*held_args, **held_kwargs)
    if to_host or (packet is aten.copy_ and not isinstance(args[0], OnGpu)):
        return args[0] if packet is aten.copy_ else result
    known = {id(t.held): t for t in tensors if isinstance(t, OnGpu)}  # what an op in place returns
    return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else OnGpu(t), result)


class Factories(TorchFunctionMode):
    """Calls that name a device or take the default one, and those that torch does not dispatch."""

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if fn in _device._device_constructors():
            device = kwargs.get("device")
            if is_gpu(device if device is not None else _device.CURRENT_DEVICE):
                return self.make(fn, args, kwargs)
        elif fn in (torch.Tensor.to, torch.Tensor.cuda) and not isinstance(args[0], OnGpu):
            return self.move(fn, args, kwargs)
        elif fn in UNDISPATCHED and isinstance(args[0], OnGpu):
            must_wait(fn)
            return tree_map_only(torch.Tensor, OnGpu, fn(args[0].held, *args[1:], **kwargs))
        elif fn is torch.Tensor.__setitem__ and isinstance(
            args[0], OnGpu
        ):  # torch makes numbers and lists meta tensors
            return fn(*tree_map_only(OnGpu, lambda t: t.held, args))
        elif fn is torch.Tensor.__getitem__ and isinstance(args[1], tuple) and any(type(i) is list for i in args[1]):
            return fn(args[0], tuple(OnGpu(torch.tensor(i, device="cpu")) if type(i) is list else i for i in args[1]))
        elif fn is torch.where and len(args) == 3:  # likewise
            like = next((t for t in args[1:] if isinstance(t, OnGpu)), None)
            return fn(*(t if like is None or isinstance(t, torch.Tensor) else torch.full_like(like, t) for t in args))
        elif fn is torch.Tensor.to and any(is_gpu(w) for w in args[1:] if isinstance(w, (str, torch.device))):
            return fn(args[0], *(w for w in args[1:] if not isinstance(w, (str, torch.device))), **kwargs)
        elif fn is torch.Tensor.cuda:
            return args[0]
        return fn(*args, **kwargs)

    def make(self, fn, args, kwargs):
        generator = kwargs.get("generator")
        if generator is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if fn in (torch.tensor, torch.as_tensor, torch.asarray):
            must_wait(fn)
        requires_grad = kwargs.pop("requires_grad", False)
        args, kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs | {"device": "cpu"}))
        return OnGpu(fn(*args, **kwargs)).requires_grad_(requires_grad)

    def move(self, fn, args, kwargs):
        tensor, *words = args
        device = kwargs.pop("device", None) or next((w for w in words if isinstance(w, (str, torch.device))), None)
        words = [w for w in words if w is not device]
        like = next((w for w in words if isinstance(w, OnGpu)), None)
        if not (is_gpu(device) or like is not None or fn is torch.Tensor.cuda):
            return fn(*args, **kwargs) if device is None else fn(tensor, device, *words, **kwargs)
        must_wait(fn)
        words = [w.held if w is like else w for w in words]
        held = tensor.detach().to(*words, **kwargs) if words or kwargs else tensor.detach()
        return OnGpu(held.clone()).requires_grad_(tensor.requires_grad)


def must_wait(fn):
    if waiting_is_refused:
        raise RuntimeError(f"{fn.__name__}: makes the host wait for the GPU")


@contextlib.contextmanager
def must_not_wait():
    """As within a capture: what makes the host wait, or copies between host and GPU, raises."""
    with mock.patch(f"{__name__}.waiting_is_refused", True):
        yield


class Event:
    """Of the host's clock."""

    def __init__(self, **_):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, later):
        return (later.time - self.time) * 1e3


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


@contextlib.contextmanager
def pretended():
    """Tensors made on "cuda" are OnGpu, and torch.cuda answers."""
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda *_: "a pretended GPU",
        "synchronize": lambda *_: None, "_sleep": lambda cycles: None, "mem_get_info": lambda *_: (8 << 30, 8 << 30),
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "Event": Event,
        "reset_peak_memory_stats": lambda *_: None, "Stream": Stream, "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": lambda _: must_not_wait(),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch("llamakern._C.cuda_built", True))
        stack.enter_context(mock.patch("torch._C._InferenceMode", lambda mode: torch.set_grad_enabled(not mode)))
        stack.enter_context(Factories())
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to replaces tensors, not their C++ half
        yield
