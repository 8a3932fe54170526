"""Experts shared out over processes: each keeps some of them, and tokens travel to their expert and back.

    slots of this process, sorted by expert  -> all-to-all ->  rows for my experts, from every process
    what my experts make of them             -> all-to-all ->  the same slots, combined as if all experts were here

Both exchanges are torch.distributed's own, with uneven splits, and carry gradients back the same way. A process may
receive no row at all. Gradients of experts are sums over the tokens of all processes; those of what every process
holds, such as the router, are of its own tokens alone and still to be summed or averaged.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from llamakern.moe import Experts, MoE, NF4Experts
from llamakern.ops.moe import moe_combine, moe_dispatch, moe_gather
from llamakern.ops.nf4 import tokens


def share_experts_(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Leaves each process of the group its share of every layer's experts, dense or NF4: neighbours, as many as fit.

    Every process holds the whole model before. Adapters are added after it. ValueError if there are fewer experts than
    processes, or if experts carry adapters.
    """
    for path, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        if not isinstance(module.experts, Experts):
            got = type(module.experts).__name__
            raise ValueError(f"expert_parallel: {path}.experts must be plain experts, got {got}")
        module.experts = SharedExperts(module.experts, group)
    return model


class SharedExperts(nn.Module):
    """In place of a MoE's experts: `local` are this process's, those from `first` on of `n_experts`."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup | None = None):
        super().__init__()
        size, rank, E = dist.get_world_size(group), dist.get_rank(group), experts.n_experts
        if size > E:
            raise ValueError(f"expert_parallel: there must be at least {size} experts for as many processes, got {E}")
        bounds = [E * i // size for i in range(size + 1)]
        self.group, self.n_experts, self.first = group, E, bounds[rank]
        self.owned = [b - a for a, b in pairwise(bounds)]
        self.local = part_of(experts, bounds[rank], bounds[rank + 1])

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, *, scale_input: bool = False) -> Tensor:
        rows = tokens(x)
        offsets, order, position = moe_dispatch(experts, self.n_experts)
        wide = torch.float32 if rows.dtype == torch.float16 else rows.dtype
        u = moe_gather(rows.to(wide), weights if scale_input else None, order, position).to(rows.dtype)
        mine, sent, received = self.counts(offsets)
        arrived = all_to_all_single_autograd(u, received, sent, self.group_or_default())
        ones = torch.ones(len(arrived), 1, device=x.device)
        made = self.local(arrived, ones, mine[:, None], scale_input=False)
        back = all_to_all_single_autograd(made, sent, received, self.group_or_default())
        y = moe_combine(back.to(wide), None if scale_input else weights.float(), order, position)
        return y.to(x.dtype).reshape(x.shape)

    def counts(self, offsets: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Which of my experts each row that arrives is for, and how many rows go to and come from each process."""
        per_expert = offsets.diff()  # (E,), those of each process side by side
        n_local, size = self.owned[dist.get_rank(self.group)], len(self.owned)
        arriving = per_expert.new_empty(n_local * size)
        dist.all_to_all_single(arriving, per_expert, [n_local] * size, self.owned, group=self.group)
        sent = [int(part.sum()) for part in per_expert.split(self.owned)]
        received = arriving.view(size, n_local).sum(1).tolist()
        ids = torch.arange(n_local, dtype=torch.int32, device=offsets.device).repeat(size)
        return ids.repeat_interleave(arriving), sent, received

    def group_or_default(self) -> dist.ProcessGroup:
        return self.group if self.group is not None else dist.group.WORLD

    def extra_repr(self) -> str:
        return f"{self.first} to {self.first + self.local.n_experts - 1} of {self.n_experts}"


def part_of(experts: Experts, first: int, last: int) -> Experts:
    """Those from first to last - 1, in tensors of their own."""
    sizes = last - first, experts.dim, experts.hidden_dim
    if isinstance(experts, NF4Experts):
        knobs = {"block_size": experts.block_size, "double_quant": experts.double_quant}
        part = NF4Experts(*sizes, **knobs, device="meta")
    else:
        with torch.device("meta"):
            part = Experts(*sizes)
    for name, p in experts.named_parameters():
        setattr(part, name, nn.Parameter(p.detach()[first:last].clone(), requires_grad=p.requires_grad))
    return part.train(experts.training)
