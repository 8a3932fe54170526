"""Mixture-of-experts configurations, and the Hugging Face families that have them.

llama4, llama4_text    sigmoid scores scale what the experts are given; a shared expert; interleaved RoPE
mixtral                renormalised softmax over the chosen
qwen2_moe, qwen3_moe   softmax; the one has a gated shared expert, the other normalises q and k by head
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEConfig:
    """Which layers have experts, and how tokens reach them.

    layers         their indices from 0 on; None: all
    hidden_dim     F of an expert; shared_dim: that of the shared expert, 0 for none
    score, renormalize, scale_input      those of ops.moe_route and ops.moe_mlp
    shared_gate    multiplies the shared expert's result by σ(x·w_g)
    balance_loss, z_loss                 coefficients of the auxiliary losses in training
    """

    n_experts: int = 16
    top_k: int = 1
    hidden_dim: int = 8192
    layers: tuple[int, ...] | None = None
    shared_dim: int = 0
    shared_gate: bool = False
    score: str = "softmax"
    renormalize: bool = False
    scale_input: bool = False
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("n_experts", "top_k", "hidden_dim"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"config: {name} of moe must be a positive integer, got {value!r}")
        if self.top_k > self.n_experts:
            raise ValueError(f"config: top_k of moe must be at most {self.n_experts}, got {self.top_k}")
        if type(self.shared_dim) is not int or self.shared_dim < 0:
            raise ValueError(f"config: shared_dim of moe must be an integer from 0 on, got {self.shared_dim!r}")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"config: score of moe must be 'softmax' or 'sigmoid', got {self.score!r}")
        if not all(type(i) is int and i >= 0 for i in self.layers or ()):
            raise ValueError(f"config: layers of moe must be indices from 0 on, got {self.layers!r}")

    def has(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


def every(n_layers: int, step: int) -> tuple[int, ...]:
    """step - 1, 2·step - 1, ...: every step-th of n_layers layers, the last of each group."""
    return tuple(range(step - 1, n_layers, step))


# What each family leaves no choice about, and what is missing from its config.json if nothing is said.
FAMILIES = {
    "llama4_text": ({"hidden_act": "silu", "attention_bias": False}, {"rms_norm_eps": 1e-5, "rope_theta": 500000.0}),
    "mixtral": ({"hidden_act": "silu", "sliding_window": None}, {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen2_moe": ({"hidden_act": "silu", "use_sliding_window": False}, {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}),
    "qwen3_moe": (
        {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
        {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    ),
}


def from_hf(hf: dict) -> dict:
    """The fields of LlamaConfig that a mixture of experts has beside those of every LLaMA. ValueError if one is bad."""
    kind, n = hf["model_type"], hf["num_hidden_layers"]
    for key, wanted in FAMILIES[kind][0].items():
        if hf.get(key, wanted) != wanted:
            raise ValueError(f"config: {key} must be {wanted!r}, got {hf[key]!r}")
    return _llama4(hf, n) if kind == "llama4_text" else _mixtral(hf) if kind == "mixtral" else _qwen(hf, kind, n)


def _llama4(hf, n):
    rotates = hf.get("no_rope_layers") or [
        int((i + 1) % (hf.get("no_rope_layer_interval") or 4) != 0) for i in range(n)
    ]
    layers, step = hf.get("moe_layers"), hf.get("interleave_moe_layer_step") or 1
    return {
        "hidden_dim": hf["intermediate_size_mlp"],
        "rope_layout": "interleaved",
        "nope_layers": tuple(i for i in range(n) if not rotates[i]),
        "attention_chunk": hf.get("attention_chunk_size", 8192),
        "qk_norm": "after_rope" if hf.get("use_qk_norm", True) else None,
        "attn_scale": hf.get("attn_scale", 0.1) if hf.get("attn_temperature_tuning", True) else 0.0,
        "floor_scale": hf.get("floor_scale", 8192),
        "moe": MoEConfig(
            n_experts=hf["num_local_experts"],
            top_k=hf.get("num_experts_per_tok", 1),
            hidden_dim=hf["intermediate_size"],
            layers=tuple(layers) if layers is not None else every(n, step),
            shared_dim=hf["intermediate_size"],
            score="sigmoid",
            scale_input=True,
        ),
    }


def _mixtral(hf):
    chosen = {"n_experts": hf["num_local_experts"], "top_k": hf.get("num_experts_per_tok", 2)}
    return {"moe": MoEConfig(hidden_dim=hf["intermediate_size"], renormalize=True, **chosen)}


def _qwen(hf, kind, n):
    dense = set(hf.get("mlp_only_layers") or ())
    second = kind == "qwen2_moe"
    return {
        "qkv_bias": second and hf.get("qkv_bias", True),
        "qk_norm": None if second else "before_rope",
        "moe": MoEConfig(
            n_experts=hf["num_experts" if "num_experts" in hf else "num_local_experts"],  # newer files of Qwen3
            top_k=hf["num_experts_per_tok"],
            hidden_dim=hf["moe_intermediate_size"],
            layers=tuple(i for i in every(n, hf.get("decoder_sparse_step", 1)) if i not in dense),
            shared_dim=hf["shared_expert_intermediate_size"] if second else 0,
            shared_gate=second,
            renormalize=hf.get("norm_topk_prob", False),
        ),
    }


def family(config) -> str:
    """The Hugging Face family that a LlamaConfig with experts belongs to. ValueError if it is none of them."""
    moe = config.moe
    if moe.scale_input and moe.score == "sigmoid" and moe.shared_dim == moe.hidden_dim and not config.qkv_bias:
        kind = "llama4_text"
    elif moe.score == "sigmoid" or moe.scale_input or config.nope_layers or config.attention_chunk:
        kind = None
    elif moe.shared_dim and moe.shared_gate and config.qk_norm is None:
        kind = "qwen2_moe"
    elif config.qk_norm == "before_rope" and not moe.shared_dim and not config.qkv_bias:
        kind = "qwen3_moe"
    elif config.qk_norm is None and moe.renormalize and moe.layers is None and not moe.shared_dim:
        kind = "mixtral"
    else:
        kind = None
    if kind is None or (config.rope_layout == "interleaved") != (kind == "llama4_text"):
        raise ValueError(f"config: moe must be of one of {', '.join(FAMILIES)} in a Hugging Face config, got {moe}")
    return kind


ARCHITECTURES = {
    "llama4_text": "Llama4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def to_hf(config) -> dict:
    """What config.json of such a model says beside, or in place of, what every LLaMA's says."""
    kind, moe, n = family(config), config.moe, config.n_layers
    layers = list(range(n)) if moe.layers is None else list(moe.layers)
    said = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, **FAMILIES[kind][0]}
    said |= {"num_experts_per_tok": moe.top_k}
    if kind == "llama4_text":
        return said | {
            "num_local_experts": moe.n_experts,
            "intermediate_size": moe.hidden_dim,
            "intermediate_size_mlp": config.hidden_dim,
            "moe_layers": layers,
            "no_rope_layers": [int(i not in config.nope_layers) for i in range(n)],
            "attention_chunk_size": config.attention_chunk,
            "use_qk_norm": config.qk_norm == "after_rope",
            "attn_temperature_tuning": config.attn_scale != 0,
            "attn_scale": config.attn_scale or 0.1,
            "floor_scale": config.floor_scale,
        }
    if kind == "mixtral":
        return said | {"num_local_experts": moe.n_experts, "intermediate_size": moe.hidden_dim}
    said |= {
        "num_experts": moe.n_experts,
        "moe_intermediate_size": moe.hidden_dim,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(n) if i not in layers],
    }
    return said | ({"shared_expert_intermediate_size": moe.shared_dim} if kind == "qwen2_moe" else {})
