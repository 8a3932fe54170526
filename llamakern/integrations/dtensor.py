"""Tensor parallelism: the NF4 and LoRA linears on DTensors, and a plan of a LLaMA for torch's parallelize_module.

    column-wise   the rows of W lie on different processes      y = [x W₁ᵀ | x W₂ᵀ]       dx = Σ dyᵢ Wᵢ
    row-wise      the columns of W do, and those of x           y = Σ xᵢ Wᵢᵀ              dx = [dy W₁ | dy W₂]

Importing this module registers how the ops shard (`register_sharding`). The raw ops are told N and K, which differ by
process; so on DTensors each becomes a twin in `llamakern_sharded` that takes them from the part of W at hand. A block
of W and its absmax always lie together.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from llamakern.nn import LoRALinear, NF4Linear

# ---------------------------------------------------------------------------------------------------------------------
# The ops

raw = torch.ops.llamakern
R, P = Replicate(), Partial()


def n_k(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], 2 * weight.shape[1]


@torch.library.custom_op("llamakern_sharded::nf4_linear", mutates_args=())
def nf4_linear(x: Tensor, weight: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    return raw._nf4_linear(x, weight, absmax, None, None, None, *n_k(weight), block_size)


@torch.library.custom_op("llamakern_sharded::nf4_linear_backward", mutates_args=())
def nf4_linear_backward(dy: Tensor, weight: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    return raw.nf4_linear_backward(dy, weight, absmax, None, None, *n_k(weight), block_size)


@torch.library.custom_op("llamakern_sharded::nf4_lora_linear", mutates_args=())
def nf4_lora_linear(
    x: Tensor, weight: Tensor, absmax: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    rest = (None, None, None, None, scale, 0.0, *n_k(weight), block_size)
    return raw._nf4_lora_linear(x, weight, absmax, lora_a, lora_b, *rest)


@torch.library.custom_op("llamakern_sharded::nf4_lora_linear_backward", mutates_args=())
def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (None, None, None, scale, 0.0, *n_k(weight), block_size, True)
    return raw.nf4_lora_linear_backward(dy, x, weight, absmax, lora_a, lora_b, h, *rest)


@nf4_linear.register_fake
def _(x, weight, absmax, block_size):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@nf4_linear_backward.register_fake
def _(dy, weight, absmax, block_size):
    return dy.new_empty(*dy.shape[:-1], 2 * weight.shape[1])


@nf4_lora_linear.register_fake
def _(x, weight, absmax, lora_a, lora_b, scale, block_size):
    h = x.new_empty(x.shape[:-1].numel(), lora_a.shape[0], dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), h


@nf4_lora_linear_backward.register_fake
def _(dy, x, weight, absmax, lora_a, lora_b, h, scale, block_size):
    return torch.empty_like(x), torch.empty_like(lora_a), torch.empty_like(lora_b)


twin = torch.ops.llamakern_sharded


@register_sharding(twin.nf4_linear.default)
def _(x, weight, absmax, block_size):
    last = Shard(x.ndim - 1)
    batch = [([Shard(d)], [Shard(d), R, R, None]) for d in range(x.ndim - 1)]
    column, row = [Shard(0)] * 2, [Shard(1)] * 2
    return [([R], [R, R, R, None]), ([last], [R, *column, None]), ([P], [last, *row, None]), *batch]


@register_sharding(twin.nf4_linear_backward.default)
def _(dy, weight, absmax, block_size):
    last = Shard(dy.ndim - 1)
    batch = [([Shard(d)], [Shard(d), R, R, None]) for d in range(dy.ndim - 1)]
    column, row = [Shard(0)] * 2, [Shard(1)] * 2
    return [([R], [R, R, R, None]), ([P], [last, *column, None]), ([last], [R, *row, None]), *batch]


@register_sharding(twin.nf4_lora_linear.default)
def _(x, weight, absmax, lora_a, lora_b, scale, block_size):
    last, none = Shard(x.ndim - 1), [None] * 2
    return [
        ([R, R], [R] * 5 + none),
        ([last, R], [R, Shard(0), Shard(0), R, Shard(0), *none]),
        ([P, P], [last, Shard(1), Shard(1), Shard(1), R, *none]),
        ([Shard(0), Shard(0)], [Shard(0), R, R, R, R, *none]),
    ]


@register_sharding(twin.nf4_lora_linear_backward.default)
def _(dy, x, weight, absmax, lora_a, lora_b, h, scale, block_size):
    last, none = Shard(x.ndim - 1), [None] * 2
    return [
        ([R, R, R], [R] * 7 + none),
        ([P, P, Shard(0)], [last, R, Shard(0), Shard(0), R, Shard(0), R, *none]),
        ([last, Shard(1), P], [R, last, Shard(1), Shard(1), Shard(1), R, P, *none]),
        ([Shard(0), P, P], [Shard(0), Shard(0), R, R, R, R, Shard(0), *none]),
    ]


def on_dtensors(name: str):
    """Decorates what stands in for llamakern::<name> where an argument is a DTensor."""

    def register(fn):
        op = f"llamakern::{name}"
        torch.library.register_torch_dispatch(op, DTensor, lambda mode, func, types, args=(), kwargs=None: fn(*args))
        return fn

    return register


@on_dtensors("_nf4_linear")
def _(x, weight, absmax, bias, absmax_scale, absmax_offset, N, K, block_size):
    check_packed("nf4_linear", weight, absmax_scale, block_size)
    y = twin.nf4_linear(x, weight, absmax, block_size)
    return y if bias is None else y + bias


@on_dtensors("nf4_linear_backward")
def _(dy, weight, absmax, absmax_scale, absmax_offset, N, K, block_size):
    return twin.nf4_linear_backward(dy, weight, absmax, block_size)


@on_dtensors("_nf4_lora_linear")
def _(x, weight, absmax, a, b, bias, absmax_scale, absmax_offset, seed, scale, dropout, N, K, block_size):
    check_packed("nf4_lora_linear", weight, absmax_scale, block_size)
    if dropout:
        raise NotImplementedError(f"nf4_lora_linear: dropout must be 0 on DTensors, got {dropout}")
    y, h = twin.nf4_lora_linear(x, weight, absmax, a, b, scale, block_size)
    return y if bias is None else y + bias, h


@on_dtensors("nf4_lora_linear_backward")
def _(dy, x, weight, absmax, a, b, h, absmax_scale, absmax_offset, seed, scale, dropout, N, K, block_size, want_dx):
    return twin.nf4_lora_linear_backward(dy, x, weight, absmax, a, b, h, scale, block_size)


def check_packed(op: str, weight: Tensor, absmax_scale: Tensor | None, block_size: int) -> None:
    if weight.dim() == 1:
        raise NotImplementedError(f"{op}: weight must have shape (N, K/2) on DTensors, got flat bytes")
    if absmax_scale is not None:
        raise NotImplementedError(f"{op}: absmax must be float32 on DTensors, got one quantised again")
    for dim, placement in enumerate(weight.placements if isinstance(weight, DTensor) else ()):
        K = 2 * -(-weight.shape[1] // weight.device_mesh.size(dim))  # of the first part, which is the widest
        if placement.is_shard(1) and K % block_size:
            raise ValueError(f"{op}: each process's part of K must be a multiple of block_size {block_size}, got {K}")


# ---------------------------------------------------------------------------------------------------------------------
# The plan


class NF4Parallel(ParallelStyle):
    """Shards an NF4Linear, alone or within a LoRALinear, `by` column or row: a value of a parallelize_module plan.

    Column-wise takes x whole and gives its part of y; row-wise takes such a part and gives y whole, on plain tensors.
    ValueError where the width does not divide, NotImplementedError for a linear of another kind.
    """

    DIMS = {  # noqa: RUF012
        "column": {"weight": 0, "absmax": 0, "bias": 0, "lora_b": 0},
        "row": {"weight": 1, "absmax": 1, "lora_a": 1},
    }

    def __init__(self, by: str):
        if by not in self.DIMS:
            raise ValueError(f"tensor_parallel: by must be one of {list(self.DIMS)}, got {by!r}")
        self.by = by

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        self.check(module, device_mesh.size())
        return distribute_module(module, device_mesh, self.partition, self.enter, self.leave)

    def check(self, module: nn.Module, size: int) -> None:
        linear = module.base if isinstance(module, LoRALinear) else module
        if not isinstance(linear, NF4Linear) or linear.double_quant or linear.shape is not None:
            raise NotImplementedError(f"tensor_parallel: linear must be an NF4Linear of float32 absmax, got {linear}")
        N, K = linear.out_features, linear.in_features
        if self.by == "column" and N % size:
            raise ValueError(f"tensor_parallel: out_features must be a multiple of {size} processes, got {N}")
        if self.by == "row" and K % (size * linear.block_size):
            multiple = f"{size} processes x block_size {linear.block_size}"
            raise ValueError(f"tensor_parallel: in_features must be a multiple of {multiple} by row, got {K}")

    def partition(self, name: str, module: nn.Module, mesh) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            if (dim := self.DIMS[self.by].get(key)) is not None:
                shard = distribute_tensor(p.detach(), mesh, [Shard(dim)])
                module.register_parameter(key, nn.Parameter(shard, requires_grad=p.requires_grad))

    def enter(self, module: nn.Module, inputs: tuple, mesh) -> tuple:
        x, *rest = inputs
        given = Replicate() if self.by == "column" else Shard(x.dim() - 1)
        return DTensor.from_local(x, mesh, [given], run_check=False), *rest

    def leave(self, module: nn.Module, y: DTensor, mesh) -> Tensor:
        return (y if self.by == "column" else y.redistribute(placements=[Replicate()])).to_local()


def tensor_parallel_plan(model: nn.Module, size: int) -> dict[str, ParallelStyle]:
    """What parallelize_module(model, mesh, plan) needs to spread the blocks of a `Llama` over `size` processes.

    Heads are dealt out whole: ValueError unless n_heads and n_kv_heads are multiples of size. Embedding, norms and head
    stay on every process. There is no plan for a cache: train, or evaluate whole sequences.
    """
    for name in ("n_heads", "n_kv_heads"):
        if (n := getattr(model.config, name)) % size:
            raise ValueError(f"tensor_parallel: {name} must be a multiple of {size} processes, got {n}")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    plan = {f"layers.*.{name}": NF4Parallel("column") for name in columns}
    return plan | {f"layers.*.{name}": NF4Parallel("row") for name in rows}
