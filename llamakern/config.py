"""The numbers that make a LLaMA: sizes, rotary settings, and the published models by name."""

import dataclasses
from dataclasses import dataclass

from llamakern import config_moe
from llamakern.config_moe import MoEConfig, every


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's stretched rotary frequencies. See `llamakern.rotary.frequencies` for the formula."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass
class LlamaConfig:
    """A LLaMA, dense or with experts. `head_dim` is dim / n_heads and `n_kv_heads` is n_heads unless given.

    `rope_layout` names the pairs that one angle turns: "half" is (i, i + D/2), as in Hugging Face files,
    "interleaved" is (2i, 2i + 1), as in Meta's and in LLaMA 4's.

    `moe` gives some layers experts; `hidden_dim` is then that of the other ones. LLaMA 4: the `nope_layers` do not
    rotate and see the whole past, all others its latest part, `attention_chunk`; `qk_norm` "after_rope" makes each
    head of q and k of length sqrt(D), without weights, in layers that rotate ("before_rope": with weights, in all);
    in NoPE layers q is multiplied by 1 + attn_scale·ln(1 + floor((position + 1) / floor_scale)).
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int = 11008
    vocab_size: int = 32000
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    rope_layout: str = "half"
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    moe: MoEConfig | None = None
    nope_layers: tuple[int, ...] = ()
    attention_chunk: int | None = None
    qk_norm: str | None = None
    attn_scale: float = 0.0
    floor_scale: int = 8192
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "max_seq_len"):
            _check_positive(name, getattr(self, name))
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"config: dim must be divisible by n_heads, got {self.dim} and {self.n_heads}")
        self.head_dim = self.dim // self.n_heads if self.head_dim is None else self.head_dim
        _check_positive("n_kv_heads", self.n_kv_heads)
        _check_positive("head_dim", self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"config: n_heads must be divisible by n_kv_heads, got {self.n_heads} and {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even, got {self.head_dim}")
        if self.rope_layout not in ("half", "interleaved"):
            raise ValueError(f"config: rope_layout must be 'half' or 'interleaved', got {self.rope_layout!r}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise ValueError(f"config: {name} must be a positive number, got {value!r}")
            setattr(self, name, float(value))
        for name in ("tie_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config: {name} must be true or false, got {getattr(self, name)!r}")
        self._check_llama4()
        for name in ("bos_id", "eos_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(type(i) is int for i in ids):
                raise ValueError(f"config: {name} must be a token id, several or none, got {value!r}")

    def _check_llama4(self):
        self.nope_layers = tuple(self.nope_layers)
        _check_positive("floor_scale", self.floor_scale)
        if self.attention_chunk is not None:
            _check_positive("attention_chunk", self.attention_chunk)
        if self.qk_norm not in (None, "after_rope", "before_rope"):
            raise ValueError(f"config: qk_norm must be None, 'after_rope' or 'before_rope', got {self.qk_norm!r}")
        for name, layers in {"nope_layers": self.nope_layers, "layers of moe": self.moe and self.moe.layers}.items():
            if not all(type(i) is int and 0 <= i < self.n_layers for i in layers or ()):
                raise ValueError(f"config: {name} must lie in [0, {self.n_layers}), got {layers!r}")
        if type(self.attn_scale) not in (int, float) or not abs(self.attn_scale) < float("inf"):
            raise ValueError(f"config: attn_scale must be a number, got {self.attn_scale!r}")

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """The configuration of a published model, such as "llama3.1-8b". ValueError names the known ones."""
        if name not in PRESETS:
            raise ValueError(f"config: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, hf: dict) -> "LlamaConfig":
        """Reads the contents of a Hugging Face `config.json`, in its old and its new spelling."""
        if hf.get("model_type") == "llama4":
            hf = hf.get("text_config") or {}  # the text of a model that sees images too
        experts = hf.get("model_type") in config_moe.FAMILIES
        for key, wanted in () if experts else HF_FIXED.items():
            if hf.get(key, wanted) != wanted:
                raise ValueError(f"config: {key} must be {wanted!r}, got {hf[key]!r}")
        missing = [key for key in HF_REQUIRED if hf.get(key) is None]
        if missing:
            raise ValueError(
                f"config: config.json must hold {', '.join(HF_REQUIRED)}, got none of {', '.join(missing)}"
            )
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"config: rope_parameters and rope_scaling must be objects, got {rope!r}")
        max_seq_len = hf.get("max_position_embeddings", 2048)
        eos_id = hf.get("eos_token_id", 2)
        usual = config_moe.FAMILIES[hf["model_type"]][1] if experts else {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
        fields = _moe_fields(hf) if experts else {}
        return cls(
            dim=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf.get("num_key_value_heads"),
            head_dim=hf.get("head_dim"),
            hidden_dim=fields.pop("hidden_dim", hf["intermediate_size"]),
            vocab_size=hf["vocab_size"],
            max_seq_len=max_seq_len,
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or usual["rope_theta"],
            rope_scaling=_rope_scaling(rope, max_seq_len),
            norm_eps=hf.get("rms_norm_eps", usual["rms_norm_eps"]),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            bos_id=hf.get("bos_token_id", 1),
            eos_id=tuple(eos_id) if isinstance(eos_id, list) else eos_id,
            **fields,
        )

    def to_hf(self) -> dict:
        """The contents of a `config.json` that transformers reads, whether it knows the old or the new spelling."""
        if self.rope_layout != "half" and self.moe is None:
            raise ValueError(f"config: rope_layout must be 'half' in a Hugging Face config, got {self.rope_layout!r}")
        scaling = self.rope_scaling and {
            "rope_type": "llama3",
            "factor": self.rope_scaling.factor,
            "low_freq_factor": self.rope_scaling.low_freq_factor,
            "high_freq_factor": self.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": self.rope_scaling.original_max_seq_len,
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            **HF_FIXED,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.hidden_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id,
            **(config_moe.to_hf(self) if self.moe else {}),
        }

    def replace(self, **changes) -> "LlamaConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


HF_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
HF_FIXED = {"model_type": "llama", "hidden_act": "silu"}


def _check_positive(name, value):
    if type(value) is not int or value < 1:
        raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
    if value >= 2**31:  # products of two such sizes still fit in 64 bits
        raise ValueError(f"config: {name} must be below 2^31, got {value}")


def _moe_fields(hf: dict) -> dict:
    try:
        return config_moe.from_hf(hf)
    except KeyError as e:
        raise ValueError(f"config: config.json of {hf['model_type']} must hold {e.args[0]}, got none") from None
    except TypeError as e:
        raise ValueError(f"config: config.json of {hf['model_type']} must hold numbers and lists, got {e}") from None


def _is_positive(value):
    return type(value) in (int, float) and 0 < value <= 1e300


def _rope_scaling(rope: dict, max_seq_len: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config: rope_type must be 'default' or 'llama3', got {kind!r}")
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    numbers = [rope.get(name) for name in factors] + [rope.get("original_max_position_embeddings", max_seq_len)]
    if not all(_is_positive(n) for n in numbers):
        raise ValueError(f"config: rope_scaling must hold {', '.join(factors)} as positive numbers, got {rope}")
    return RopeScaling(*map(float, numbers[:3]), numbers[3])


def _sizes(dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim):
    return {
        "dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim,
        "hidden_dim": hidden_dim,
    }  # fmt: skip


_7B = _sizes(4096, 32, 32, 32, 128, 11008)
_13B = _sizes(5120, 40, 40, 40, 128, 13824)
_33B = _sizes(6656, 60, 52, 52, 128, 17920)
_65B = _sizes(8192, 80, 64, 64, 128, 22016)
_8B = _sizes(4096, 32, 32, 8, 128, 14336)
_70B = _sizes(8192, 80, 64, 8, 128, 28672)
_405B = _sizes(16384, 126, 128, 8, 128, 53248)
_1B = _sizes(2048, 16, 32, 8, 64, 8192)
_3B = _sizes(3072, 28, 24, 8, 128, 8192)

_LLAMA1 = {"vocab_size": 32000, "max_seq_len": 2048, "norm_eps": 1e-6}
_LLAMA2 = {"vocab_size": 32000, "max_seq_len": 4096, "norm_eps": 1e-5}
_LLAMA3 = {
    "vocab_size": 128256, "max_seq_len": 8192, "norm_eps": 1e-5, "rope_theta": 500000.0, "bos_id": 128000,
    "eos_id": 128001,
}  # fmt: skip
_LLAMA31 = {**_LLAMA3, "max_seq_len": 131072, "rope_scaling": RopeScaling(factor=8.0)}
_LLAMA32 = {**_LLAMA31, "rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}

_LLAMA4 = {
    **_sizes(5120, 48, 40, 8, 128, 16384), "vocab_size": 202048, "norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_layout": "interleaved", "bos_id": 200000, "eos_id": (200001, 200007, 200008), "nope_layers": every(48, 4),
    "attention_chunk": 8192, "attn_scale": 0.1,
}  # fmt: skip
_LLAMA4_EXPERTS = {"hidden_dim": 8192, "shared_dim": 8192, "score": "sigmoid", "scale_input": True}
_SCOUT = {
    **_LLAMA4, "max_seq_len": 10485760, "qk_norm": "after_rope",
    "rope_scaling": RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    "moe": MoEConfig(n_experts=16, layers=every(48, 1), **_LLAMA4_EXPERTS),
}  # fmt: skip
_MAVERICK = {
    **_LLAMA4, "max_seq_len": 1048576, "moe": MoEConfig(n_experts=128, layers=every(48, 2), **_LLAMA4_EXPERTS),
}  # fmt: skip

PRESETS = {
    "llama-7b": {**_7B, **_LLAMA1},
    "llama-13b": {**_13B, **_LLAMA1},
    "llama-33b": {**_33B, **_LLAMA1},
    "llama-65b": {**_65B, **_LLAMA1, "norm_eps": 1e-5},
    "llama2-7b": {**_7B, **_LLAMA2},
    "llama2-13b": {**_13B, **_LLAMA2},
    "llama2-70b": {**_70B, **_LLAMA2},
    "llama3-8b": {**_8B, **_LLAMA3},
    "llama3-70b": {**_70B, **_LLAMA3},
    "llama3.1-8b": {**_8B, **_LLAMA31},
    "llama3.1-70b": {**_70B, **_LLAMA31},
    "llama3.1-405b": {**_405B, **_LLAMA31},
    "llama3.2-1b": {**_1B, **_LLAMA32},
    "llama3.2-3b": {**_3B, **_LLAMA32},
    "llama3.3-70b": {**_70B, **_LLAMA31},
    "llama4-scout": _SCOUT,
    "llama4-maverick": _MAVERICK,
}
