"""A mixture-of-experts layer, router and shared expert included, dense and in NF4, against transformers' own module.

Mixtral's takes torch's grouped_mm; LLaMA 4's runs every expert on every token, as it stands there. Widths are those of
the published layers divided by `SCALED`, so that several copies fit into memory; all experts and top_k are theirs.
"dx" rows are forward and backward with frozen weights, "training" rows also give every weight its gradient.
"""

import copy
import importlib.util

import torch

from llamakern.bench.cases import Case
from llamakern.bench.clock import relative_error
from llamakern.bench.rivals import in_large_pages
from llamakern.config import LlamaConfig, MoEConfig
from llamakern.model import mixture
from llamakern.nn import NF4Experts, large_pages_, quantize_
from llamakern.ops.moe import moe_mlp_reference, moe_route_reference

TOKENS = (1, 64, 512, 2048)
SCALED = 2
CHECKED = 4  # tokens whose error is measured


def layer(kind: str, C: int, F: int, E: int, top_k: int, dtype: torch.dtype):
    """Ours with random weights."""

    special = {"score": "sigmoid", "scale_input": True, "shared_dim": F} if kind == "llama4" else {"renormalize": True}
    moe = MoEConfig(n_experts=E, top_k=top_k, hidden_dim=F, **special)
    module = mixture(LlamaConfig(dim=C, n_layers=1, n_heads=C // 128, vocab_size=8, moe=moe)).to(dtype)
    for p in module.parameters():
        in_large_pages(p.data)
        p.data.normal_(std=0.02)
    return module


def rival(kind: str, ours, C: int, F: int, E: int, top_k: int, dtype: torch.dtype):
    """transformers' module over the same numbers as (x (M, C)) -> y (M, C), or why there is none."""
    if importlib.util.find_spec("transformers") is None:
        return "not installed"
    with torch.device("meta"):
        if kind == "llama4":
            from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe

            sizes = {"num_local_experts": E, "num_experts_per_tok": top_k, "intermediate_size": F, "hidden_size": C}
            theirs = Llama4TextMoe(Llama4TextConfig(**sizes))
        else:
            from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

            sizes = {"num_local_experts": E, "num_experts_per_tok": top_k, "intermediate_size": F, "hidden_size": C}
            theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="grouped_mm"))
    own = dict(ours.named_parameters())
    for name, p in list(theirs.named_parameters()):
        known = own[name.replace("gate.weight", "router.weight") if kind != "llama4" else name]
        known = in_large_pages(known.mT.contiguous()) if kind == "llama4" and ".experts." in f".{name}" else known
        theirs.get_submodule(name.rpartition(".")[0]).register_parameter(
            name.rpartition(".")[2], torch.nn.Parameter(known.detach())
        )
        assert known.shape == p.shape
    return (lambda x: theirs(x)[0]) if kind == "llama4" else (lambda x: theirs(x[None])[0]), theirs


def packed(module):
    """A copy whose experts, and shared expert, are NF4."""

    same = copy.copy(module)
    same._modules = dict(module._modules)
    same.experts = NF4Experts.from_experts(module.experts)
    if module.shared_expert is not None:
        same.shared_expert = quantize_(copy.deepcopy(module.shared_expert))
    large_pages_(same)
    return same


def rows(table, label, dtype, *, M, C, F, E, top_k, llama4=0):
    kind = "llama4" if llama4 else "mixtral"
    ours, x, dy = layer(kind, C, F, E, top_k, dtype), torch.randn(M, C).to(dtype), torch.randn(M, C).to(dtype)
    nf4 = packed(ours)
    found = rival(kind, ours, C, F, E, top_k, dtype)
    theirs, module = found if isinstance(found, tuple) else (found, None)
    active = M * (top_k + bool(llama4)) * 3 * C * F
    touched = min(E, M * top_k) + bool(llama4)
    bytes_read = touched * 3 * C * F * dtype.itemsize
    stack = sum(p.nbytes for p in ours.experts.parameters())
    facts = {"smaller": stack / sum(p.nbytes for p in nf4.experts.parameters())}
    contestants = {"ours": ours, "ours NF4": nf4, "transformers": theirs}
    with torch.no_grad():
        few = x[:CHECKED]
        error = relative_error(ours(few), truth(ours, few)) if M else 0.0
        run = {n: fn if isinstance(fn, str) else lambda fn=fn: fn(x) for n, fn in contestants.items()}
        table.row(label, run, flops=2 * active, bytes_moved=bytes_read, error=error, dtype=dtype, facts=facts)

    def step(fn, leaves):
        def run():
            inputs = [x.detach().requires_grad_(), *leaves]
            return torch.autograd.grad(fn(inputs[0]), inputs, dy, allow_unused=True)

        return fn if isinstance(fn, str) else run

    def freeze(on):
        for each in (ours, nf4, module):
            for p in each.parameters() if each is not None else ():
                p.requires_grad_(on and p.is_floating_point())

    freeze(False)
    run = {name: step(fn, []) for name, fn in contestants.items()}
    table.row(f"{label} dx", run, flops=4 * active, bytes_moved=2 * bytes_read, dtype=dtype)
    freeze(True)
    leaves = {"ours": list(ours.parameters()), "transformers": list(module.parameters()) if module else []}
    run = {name: step(contestants[name], leaves[name]) for name in leaves}
    table.row(f"{label} training", run, flops=6 * active, bytes_moved=3 * bytes_read, dtype=dtype)


def truth(module, x):
    wide = x.double()
    weights, experts = moe_route_reference((x @ module.router.weight.T).float(), **module.routing)
    stacks = {name: t.double() for name, t in module.experts.stacks().items()}
    y = moe_mlp_reference(wide, weights.double(), experts, **stacks, scale_input=module.scale_input)
    if (shared := module.shared_expert) is not None:
        gate, up, down = (m.weight.double() for m in (shared.gate_proj, shared.up_proj, shared.down_proj))
        y = y + (torch.nn.functional.silu(wide @ gate.T) * (wide @ up.T)) @ down.T
    return y


MIXTRAL = {"C": 4096 // SCALED, "F": 14336 // SCALED, "E": 8, "top_k": 2}
SCOUT = {"C": 5120 // SCALED, "F": 8192 // SCALED, "E": 16, "top_k": 1, "llama4": 1}

CASES = (
    Case(
        "moe_mlp",
        rows,
        {f"mixtral/{SCALED} M={M}": {"M": M, **MIXTRAL} for M in TOKENS}
        | {f"llama4-scout/{SCALED} M={M}": {"M": M, **SCOUT} for M in TOKENS},
        (torch.bfloat16,),
    ),
)
