"""Mixture-of-experts modules: a router, SwiGLU experts dense or in NF4, LoRA around them, and the auxiliary losses.

    Experts      gate_up_proj (E, 2F, C), gate half first; down_proj (E, C, F)
    NF4Experts   the same packed, each expert by itself; frozen
    LoRAExperts  stacked adapters beside either of them
    MoE          router, experts, and a shared expert that sees every token

Shapes: M tokens, E experts, C model width, F hidden width of an expert, R rank.
"""

import torch
from torch import Tensor, nn

from llamakern import ops
from llamakern.ops.moe import moe_dispatch

PROJECTIONS = ("gate_up_proj", "down_proj")


def load_balance_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """E·Σ_e f_e P_e of logits (M, E) and experts (M, top_k), 1 where balanced (arXiv 2101.03961, eq. 4 to 6).

    f_e: the share of the M·top_k choices that went to expert e; P_e: the mean of softmax(logits) over the tokens.
    """
    E = logits.shape[-1]
    counts = moe_dispatch(experts, E)[0].diff()  # torch.bincount would make the host wait for a GPU
    shares = counts.float() / max(1, experts.numel())
    return E * (shares * logits.float().softmax(-1).mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean of logsumexp(logits)² over the tokens (arXiv 2202.08906, eq. 5): it keeps logits small."""
    return logits.float().logsumexp(-1).square().mean()


class Router(nn.Linear):
    """logits (M, E) = x Rᵀ. It is never quantised."""

    def __init__(self, dim: int, n_experts: int):
        super().__init__(dim, n_experts, bias=False)


class Experts(nn.Module):
    """SwiGLU experts as two dense stacks: gate_up_proj (E, 2F, C) and down_proj (E, C, F)."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.n_experts, self.dim, self.hidden_dim = n_experts, dim, hidden_dim
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    @property
    def weight(self) -> Tensor:
        return self.gate_up_proj

    def stacks(self) -> dict:
        """The weight arguments of ops.moe_mlp."""
        return {"w_gate_up": self.gate_up_proj, "w_down": self.down_proj}

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, *, scale_input=False, **lora) -> Tensor:
        """Σ_k weights[m, k]·f_e(x[m]), or Σ_k f_e(weights[m, k]·x[m]) with scale_input: ops.moe_mlp."""
        return ops.moe_mlp(x, weights, experts, scale_input=scale_input, **self.stacks(), **lora)

    def expert(self, name: str, e: int) -> Tensor:
        """One expert of gate_up_proj or down_proj as a dense matrix."""
        return getattr(self, name)[e]

    def extra_repr(self) -> str:
        return f"{self.n_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"


class NF4Experts(Experts):
    """Experts kept as NF4 (arXiv 2305.14314, appendix E), each quantised by itself and never dense in memory. Frozen.

    gate_up_proj         uint8    (E, 2F, C/2)
    gate_up_proj_absmax  float32  (E, 2F, C/block_size); uint8 codes if double_quant
    gate_up_proj_scale   float32  (E, ceil(2F·C / block_size / 256))     with double_quant, else None
    gate_up_proj_offset  float32  (E,)                                   with double_quant, else None

    down_proj likewise. ValueError where block_size does not divide C and F.
    """

    def __init__(self, n_experts, dim, hidden_dim, *, block_size=64, double_quant=False, device=None):
        nn.Module.__init__(self)
        self.n_experts, self.dim, self.hidden_dim = n_experts, dim, hidden_dim
        self.block_size, self.double_quant = block_size, double_quant
        for name, N, K in (("gate_up_proj", 2 * hidden_dim, dim), ("down_proj", dim, hidden_dim)):
            if K % block_size:
                raise ValueError(f"nf4_experts: block_size must divide the rows of {name}, got {block_size} for {K}")
            blocks = N * K // block_size
            shapes = {"": (N, K // 2), "_absmax": (N, K // block_size)}
            shapes |= {"_scale": (-(-blocks // 256),), "_offset": ()} if double_quant else {}
            for part in ("", "_absmax", "_scale", "_offset"):
                packed = part == "" or (part == "_absmax" and double_quant)
                dtype = torch.uint8 if packed else torch.float32
                made = torch.empty(n_experts, *shapes[part], dtype=dtype, device=device) if part in shapes else None
                self.register_parameter(name + part, None if made is None else nn.Parameter(made, requires_grad=False))

    @classmethod
    def from_experts(cls, experts: Experts, *, block_size=64, double_quant=False) -> "NF4Experts":
        """Quantises dense experts, one after the other."""
        made = cls(
            experts.n_experts, experts.dim, experts.hidden_dim, block_size=block_size, double_quant=double_quant,
            device=experts.weight.device,
        )  # fmt: skip
        for name in PROJECTIONS:
            for e in range(experts.n_experts):
                made.pack(name, e, experts.expert(name, e))
        return made.train(experts.training)

    @torch.no_grad()
    def pack(self, name: str, e: int, weight: Tensor) -> None:
        """Quantises weight (N, K) into place e of gate_up_proj or down_proj."""
        packed, absmax = ops.nf4_quantize(weight.detach().contiguous(), block_size=self.block_size)
        if self.double_quant:
            absmax, scale, offset = ops.nf4_double_quantize(absmax)
            getattr(self, f"{name}_scale")[e], getattr(self, f"{name}_offset")[e] = scale, offset
        getattr(self, name)[e], getattr(self, f"{name}_absmax")[e] = packed, absmax

    def stacks(self) -> dict:
        def pair(part):
            return getattr(self, f"gate_up_proj{part}"), getattr(self, f"down_proj{part}")

        found = {"w_gate_up": self.gate_up_proj, "w_down": self.down_proj, "absmax": pair("_absmax")}
        nested = {"absmax_scale": pair("_scale"), "absmax_offset": pair("_offset")} if self.double_quant else {}
        return found | nested | {"block_size": self.block_size}

    def expert(self, name: str, e: int) -> Tensor:
        nested = {}
        if self.double_quant:
            nested = {f"absmax_{p}": getattr(self, f"{name}_{p}")[e] for p in ("scale", "offset")}
        codes, absmax = getattr(self, name)[e], getattr(self, f"{name}_absmax")[e]
        return ops.nf4_dequantize(codes, absmax, block_size=self.block_size, **nested)

    def reset_parameters(self) -> None:
        """Nothing: a packed weight has no random start."""

    def _apply(self, fn, recurse=True):
        # A cast of the model moves the packed tensors but never changes what they hold.
        packed = list(self.parameters())

        def move(t):
            moved = fn(t)
            return t.to(moved.device) if any(t is p for p in packed) and moved.dtype != t.dtype else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        double = ", double_quant=True" if self.double_quant else ""
        return f"{super().extra_repr()}, block_size={self.block_size}{double}"


class LoRAExperts(nn.Module):
    """Experts with an adapter beside each of their matrices (arXiv 2106.09685, eq. 3): W_e + scale·B_e A_e.

    gate_up_lora_a (E, R, C), gate_up_lora_b (E, 2F, R), down_lora_a (E, R, F), down_lora_b (E, C, R), float32;
    A ~ U(-1/sqrt(K), 1/sqrt(K)), B = 0. An expert without tokens gets gradients of exactly 0.
    """

    per_expert = True  # each slice along dimension 0 trains by itself: llamakern.gate looks at them one by one

    def __init__(self, base: Experts, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        E, C, hidden = base.n_experts, base.dim, base.hidden_dim
        for name, N, K in (("gate_up", 2 * hidden, C), ("down", C, hidden)):
            like = {"dtype": torch.float32, "device": base.weight.device}
            a = torch.empty(E, rank, K, **like).uniform_(-(K**-0.5), K**-0.5)
            self.register_parameter(f"{name}_lora_a", nn.Parameter(a))
            self.register_parameter(f"{name}_lora_b", nn.Parameter(torch.zeros(E, N, rank, **like)))

    @property
    def lora_a(self) -> Tensor:
        return self.gate_up_lora_a

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, *, scale_input=False) -> Tensor:
        lora = (self.gate_up_lora_a, self.gate_up_lora_b, self.down_lora_a, self.down_lora_b)
        return self.base(x, weights, experts, scale_input=scale_input, lora=lora, scale=self.scale)

    def merged(self, name: str, e: int) -> Tensor:
        """W_e + scale·B_e A_e of gate_up_proj or down_proj as a dense matrix in float32."""
        kind = name.removesuffix("_proj")
        a, b = getattr(self, f"{kind}_lora_a")[e], getattr(self, f"{kind}_lora_b")[e]
        return torch.addmm(self.base.expert(name, e).float(), b.float(), a.float(), alpha=self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.lora_a.shape[1]}, scale={self.scale:g}"


class MoE(nn.Module):
    """x (..., C) -> (..., C): the top_k experts of each token, and the shared expert where there is one.

    logits = x Rᵀ; score, renormalize and scale_input are those of ops.moe_route and ops.moe_mlp. shared_expert: any
    module of the width; with shared_gate its result is multiplied by σ(x·w_g) (Qwen2-MoE).

    balance_loss and z_loss are the coefficients of two losses that `take_loss` gives after a forward in training.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        n_experts: int,
        top_k: int = 1,
        *,
        score: str = "softmax",
        renormalize: bool = False,
        scale_input: bool = False,
        shared_expert: nn.Module | None = None,
        shared_gate: bool = False,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.routing = {"top_k": top_k, "score": score, "renormalize": renormalize}
        self.scale_input, self.balance_loss, self.z_loss = scale_input, balance_loss, z_loss
        self.router = Router(dim, n_experts)
        self.experts = Experts(n_experts, dim, hidden_dim)
        self.shared_expert = shared_expert
        self.shared_expert_gate = Router(dim, 1) if shared_gate else None
        self._loss = None

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x.flatten(0, -2))
        weights, experts = ops.moe_route(logits, **self.routing)
        y = self.experts(x, weights, experts, scale_input=self.scale_input)
        if self.training and (self.balance_loss or self.z_loss):
            self._loss = self.balance_loss * load_balance_loss(logits, experts) + self.z_loss * router_z_loss(logits)
        if self.shared_expert is None:
            return y
        shared = self.shared_expert(x)
        return y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)

    def take_loss(self) -> Tensor | None:
        """balance_loss·load_balance_loss + z_loss·router_z_loss of the last forward, once; None if there is none."""
        loss, self._loss = self._loss, None
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in (self.routing | {"scale_input": self.scale_input}).items())


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The mean of `take_loss` over the MoE layers of a model that have one, None where none has."""
    losses = [loss for module in model.modules() if isinstance(module, MoE) if (loss := module.take_loss()) is not None]
    return torch.stack(losses).mean() if losses else None
