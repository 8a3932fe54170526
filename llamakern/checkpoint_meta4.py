"""Meta's LLaMA 4 folders: params.json, and consolidated.NN.pth for each device that the model was split over.

    attention.wqkv.weight                              rows of q, k and v, each device's own; .layer_norm_weight
    attention.wo.weight                                split along dim 1
    feed_forward.experts.moe_w_in_eD_F, moe_w_swiglu_eD_F    gate and up, (E·C, F), split along F
    feed_forward.experts.moe_w_out_eF_D                      down, (E·F, C): each device has its F of every expert
    feed_forward.router_DE                                   (C, E), in every file
    feed_forward.w_in_shared_FD, w_swiglu_FD, w_out_shared_DF, norm.weight
    feed_forward.mlp.fc1_weight (gate, then up), fc2_weight, layer_norm.weight       of layers without experts

Weights of experts are stored (in, out) and read one expert at a time. q and k turn interleaved pairs, as here.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llamakern.checkpoint_hf import read_json
from llamakern.checkpoint_meta import FREQUENCIES, OUTER, read_table, shards
from llamakern.checkpoint_moe import Stack
from llamakern.config import LlamaConfig, RopeScaling
from llamakern.config_moe import MoEConfig, every

VISION = re.compile(r"(vision_embeddings|vision_projection|vision_model|speech_\w+)\..*")
SHARED = {"gate_proj": ("w_in_shared_FD", 0), "up_proj": ("w_swiglu_FD", 0), "down_proj": ("w_out_shared_DF", 1)}


class MetaLlama4Folder:
    """The folder as a source of named tensors and of stacks of experts."""

    dtype = None

    def __init__(self, path: Path):
        self.path = path
        params = read_json(path / "params.json")
        params = params.get("model", params)
        tables = [read_table(file) for file in shards(path)]
        self.pieces = {k: [t.get(k) for t in tables] for k in tables[0] if not VISION.fullmatch(k)}
        if missing := [k for k, pieces in self.pieces.items() if None in pieces]:
            raise ValueError(f"checkpoint: every shard of {path} must hold the same tensors, got {missing[0]}")
        self.shapes, self.readers, self.stacks, self.used = {}, {}, {}, set()
        try:
            self.config = self._configure(params)
            for key, (name, dim) in OUTER.items():
                if key == "tok_embeddings":
                    dim = int(self.pieces[f"{key}.weight"][0].shape[1] != self.config.dim)
                self._add(f"{name}.weight", f"{key}.weight", dim)
            for i in range(self.config.n_layers):
                self._add_attention(f"layers.{i}")
                (self._add_experts if self.config.moe.has(i) else self._add_dense)(f"layers.{i}")
        except KeyError as e:
            raise ValueError(f"checkpoint: {path} must hold a whole LLaMA 4, got no {e.args[0]}") from None
        for key in self.pieces.keys() - self.used:
            if not FREQUENCIES.fullmatch(key):
                self.shapes[key] = self.pieces[key][0].shape  # named as unexpected by whoever matches names

    def read(self, name: str) -> Tensor:
        return self.readers[name]()

    # -----------------------------------------------------------------------------------------------------------------

    def _whole(self, key: str, dim: int | None) -> Tensor:
        pieces = self.pieces[key]
        return pieces[0].read() if dim is None or len(pieces) == 1 else torch.cat([p.read() for p in pieces], dim)

    def _shape(self, key: str, dim: int | None) -> tuple[int, ...]:
        pieces = self.pieces[key]
        self.used.add(key)
        return tuple(n if i != dim else sum(p.shape[i] for p in pieces) for i, n in enumerate(pieces[0].shape))

    def _add(self, name: str, key: str, dim: int | None) -> None:
        self.shapes[name] = self._shape(key, dim)
        self.readers[name] = lambda: self._whole(key, dim)

    def _add_part(self, name: str, key: str, shape: tuple[int, ...], part: Callable[[Tensor], Tensor]) -> None:
        """Of each device's piece a part; the parts follow one another along dim 0."""
        self._shape(key, 0)
        self.shapes[name] = shape
        self.readers[name] = lambda: torch.cat([part(p.read()) for p in self.pieces[key]])

    def _add_attention(self, layer: str) -> None:
        c, n, key = self.config, len(self.pieces["tok_embeddings.weight"]), f"{layer}.attention.wqkv.weight"
        sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            mine = [size // n for size in sizes]
            self._add_part(
                f"{layer}.self_attn.{name}.weight", key, (sizes[i], c.dim), lambda t, i=i, m=mine: t.split(m)[i]
            )
        self._add(f"{layer}.self_attn.o_proj.weight", f"{layer}.attention.wo.weight", 1)
        self._add(f"{layer}.input_layernorm.weight", f"{layer}.attention.wqkv.layer_norm_weight", None)

    def _add_dense(self, layer: str) -> None:
        c, mlp = self.config, f"{layer}.feed_forward.mlp"
        for i, name in enumerate(("gate_proj", "up_proj")):
            shape = (c.hidden_dim, c.dim)
            self._add_part(f"{layer}.mlp.{name}.weight", f"{mlp}.fc1_weight", shape, lambda t, i=i: t.chunk(2)[i])
        self._add(f"{layer}.mlp.down_proj.weight", f"{mlp}.fc2_weight", 1)
        self._add(f"{layer}.post_attention_layernorm.weight", f"{mlp}.layer_norm.weight", None)

    def _add_experts(self, layer: str) -> None:
        c, root = self.config, f"{layer}.feed_forward"
        for name, (key, dim) in SHARED.items():
            self._add(f"{layer}.mlp.shared_expert.{name}.weight", f"{root}.{key}", dim)
        self._add(f"{layer}.post_attention_layernorm.weight", f"{root}.norm.weight", None)
        name, key = f"{layer}.mlp.router.weight", f"{root}.router_DE"
        self.shapes[name] = self._shape(key, None)[::-1]
        self.readers[name] = lambda key=key: self._whole(key, None).mT.contiguous()
        gate, up, down = (f"{root}.experts.{k}" for k in ("moe_w_in_eD_F", "moe_w_swiglu_eD_F", "moe_w_out_eF_D"))
        E, F = c.moe.n_experts, c.moe.hidden_dim
        stacks = {
            "gate_up_proj": Stack(
                (E, 2 * F, c.dim), lambda e: torch.cat([self._expert(k, e, 1).mT for k in (gate, up)])
            ),
            "down_proj": Stack((E, c.dim, F), lambda e: self._expert(down, e, 0).mT),
        }
        for key in (gate, up, down):
            self._shape(key, None)
        for name, stack in stacks.items():
            self.stacks[f"{layer}.mlp.experts.{name}"] = stack
            self.shapes[f"{layer}.mlp.experts.{name}"] = stack.shape

    def _expert(self, key: str, e: int, dim: int) -> Tensor:
        """Rows of one expert of every device, (in, out), joined along `dim`."""
        pieces = self.pieces[key]
        rows = pieces[0].shape[0] // self.config.moe.n_experts
        return torch.cat([p.read_rows(e * rows, rows) for p in pieces], dim)

    # -----------------------------------------------------------------------------------------------------------------

    def _configure(self, params: dict) -> LlamaConfig:
        """The configuration that params.json and the stored shapes give."""
        moe, n = params["moe_args"], params["n_layers"]
        step, interval = moe.get("interleave_moe_layer_step", 1), params.get("nope_layer_interval") or 0
        layers = every(n, step)
        if not layers:
            raise ValueError(f"checkpoint: {self.path} must hold layers with experts, got {moe}")
        F = self._shape(f"layers.{layers[0]}.feed_forward.w_in_shared_FD", 0)[0]
        dense = [i for i in range(n) if i not in layers]
        scaling = None
        if params.get("use_scaled_rope"):
            scaling = RopeScaling(
                float(params.get("rope_scaling_factor") or 16.0), 1.0, float(params.get("rope_high_freq_factor") or 1.0)
            )
        return LlamaConfig(
            dim=params["dim"],
            n_layers=n,
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            head_dim=params.get("head_dim"),
            hidden_dim=self._shape(f"layers.{dense[0]}.feed_forward.mlp.fc2_weight", 1)[1] if dense else 2 * F,
            vocab_size=self._shape("output.weight", 0)[0],
            max_seq_len=params.get("max_seq_len", 262144),
            rope_theta=params.get("rope_theta", 500000.0),
            rope_scaling=scaling,
            norm_eps=params.get("norm_eps", 1e-5),
            rope_layout="interleaved",
            bos_id=200000,
            eos_id=(200001, 200007, 200008),
            nope_layers=every(n, interval) if interval else (),
            attention_chunk=params.get("attention_chunk_size"),
            qk_norm="after_rope" if params.get("use_qk_norm") else None,
            attn_scale=params.get("attn_scale", 0.1) if params.get("attn_temperature_tuning") else 0.0,
            floor_scale=int(params.get("floor_scale", 8192)),
            moe=MoEConfig(
                n_experts=moe.get("num_experts", 8), top_k=moe.get("top_k", 1), hidden_dim=F, layers=layers,
                shared_dim=F, score="sigmoid", scale_input=True,
            ),
        )  # fmt: skip
