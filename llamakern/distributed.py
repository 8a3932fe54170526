"""One model trained by several processes, as torchrun starts them: by DistributedDataParallel or FSDP2, both torch's.

    torchrun --nproc-per-node 2 -m llamakern finetune ...

Every process holds the whole data set and takes its share of each batch, so that a step has the examples, and but for
the order of summation the loss, of the same step in one process. One process alone meets none of this.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llamakern.nn import NF4Linear

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class World:
    """The processes of a job: this one's number and how many there are. Each method but `share` is a call of all."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of the tensors that the processes exchange

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's part of what one process would have taken alone; it may be empty."""
        return items[self.rank :: self.size]

    def sum(self, value: float) -> float:
        """The sum over all processes, in float64."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def collect(self, value: object) -> list:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], object]) -> object:
        """What make() returns in process 0, in every process."""
        if self.size == 1:
            return make()
        values = [make() if self.is_main else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def join(device: torch.device) -> World:
    """The world that torchrun started this process in, or one alone: gloo for the CPU, nccl for GPUs."""
    if not dist.is_available():
        return World()
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
            return World()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def is_main() -> bool:
    """Whether this process speaks and writes for all, known before `join` too. A RANK that torchrun did not set is
    no one's word: such a process is alone."""
    if not dist.is_available():
        return True
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Loss(nn.Module):
    """`model.loss` as a module's forward: DistributedDataParallel takes part only in what passes through that."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **knobs) -> Tensor:
        return self.model.loss(*args, **knobs)


def wrap(model: nn.Module, kind: str, world: World) -> nn.Module:
    """A module whose forward is model.loss and whose backward averages the gradient over the processes.

    ddp: each process keeps the whole model; only what trains is compared and broadcast, the frozen part every process
    has loaded itself. fsdp2: `model` is sharded in place.
    """
    if world.size == 1:
        return Loss(model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh

        return Loss(shard(model, mesh=init_device_mesh(world.device.type, (world.size,))))
    wrapped = Loss(model)
    frozen = [name for name, p in wrapped.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, frozen)
    return DistributedDataParallel(wrapped, gradient_as_bucket_view=True)


def shard(model: nn.Module, **knobs) -> nn.Module:
    """The model itself, sharded by FSDP2 (`fully_shard`) over all processes: a group per block, the rest in one.

    knobs go to fully_shard. An mp_policy needs cast_forward_inputs=False, because angles stay float32. Packed weights
    must not be cast, and torch before 2.13 shards only what is floating-point: for both `NF4Linear.store_` is called.
    Frozen scalars (the offsets of double quantisation) stay whole, since FSDP2 takes none; for a trainable one torch
    raises ValueError.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    storage = getattr(knobs.get("mp_policy"), "param_dtype", None)
    if storage is None and torch.__version__ < "2.13":
        storage = torch.bfloat16
    for module in model.modules() if storage else ():
        if isinstance(module, NF4Linear):
            module.store_(storage)
    knobs.setdefault("ignored_params", {p for p in model.parameters() if p.dim() == 0 and not p.requires_grad})
    for layer in model.layers:
        fully_shard(layer, **knobs)
    fully_shard(model, **knobs)
    register_fsdp_forward_method(model, "loss")
    return model


@contextmanager
def accumulating(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """The scope of one forward and backward: only the last of a step communicates gradients."""
    if isinstance(wrapped, DistributedDataParallel):
        with nullcontext() if last else wrapped.no_sync():
            yield
        return
    if hasattr(wrapped.model, "set_requires_gradient_sync"):
        wrapped.model.set_requires_gradient_sync(last)
    yield


def unused(wrapped: nn.Module, trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that a first backward did not reach, for which DistributedDataParallel waits in vain."""
    return [name for name, p in trainable.items() if p.grad is None] * isinstance(wrapped, DistributedDataParallel)


# ---------------------------------------------------------------------------------------------------------------------
# State


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what the processes hold of it together: then a call of all."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole`: a tensor that every process holds, sharded as `like` is."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """optimizer.state_dict() of whole tensors, as one process alone would have it: a call of all."""
    state = optimizer.state_dict()
    moments = {i: {name: whole(value) for name, value in each.items()} for i, each in state["state"].items()}
    return state | {"state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Takes up what `optimizer_state` returned."""
    optimizer.load_state_dict(state)
    for p, values in optimizer.state.items():
        values |= {name: part(value, p) for name, value in values.items()}
