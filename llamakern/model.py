"""LLaMA 1 to 4: pre-norm blocks of grouped-query attention and SwiGLU, dense or with experts (arXiv 2302.13971,
2407.21783, 2401.04088).

Module names follow Hugging Face, without its prefix `model.`. Sockets take other modules:

    linear   (x) -> y                        any projection; LoRA and NF4 plug in here
    attend   (q, k, v, x, ctx) -> y          all between the projections and o_proj, the cache included
    visual   (features) -> visual            empty: what projects an encoder's features once for all layers
    prefix   a parameter (P, C)              empty: virtual tokens in front of every sequence (prefix.py)

Shapes: B batch, T query tokens, S key tokens, H query heads, Hkv key/value heads, D head_dim, C model width,
V vocabulary.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamakern import ops
from llamakern.cache import KVCache
from llamakern.config import LlamaConfig
from llamakern.moe import Experts, MoE, Router, auxiliary_loss
from llamakern.nn import RMSNorm
from llamakern.ops._door import autocast_dtype
from llamakern.prefix import lay
from llamakern.rotary import cos_sin


class AttendContext(NamedTuple):
    """What an attend module may need beside q, k, v and x."""

    cache: KVCache | None = None
    positions: Tensor | None = None  # (T,) or (B, T)
    cu_seqlens: Tensor | None = None  # int32 (n + 1,): sequences packed into one row
    mask: Tensor | None = None  # bool, broadcastable to (B, H, T, S), True = attend
    cos: Tensor | None = None  # float32 (T, D/2) or (B, T, D/2)
    sin: Tensor | None = None
    q_raw: Tensor | None = None  # (B, T, H, D), before the rotation
    k_raw: Tensor | None = None  # (B, T, Hkv, D), before the rotation
    layer: int = 0
    scale: float | None = None  # of the scores; None: 1/sqrt(D) of q
    projections: tuple[nn.Module, nn.Module] | None = None  # the layer's k_proj and v_proj
    prompt_k: Tensor | None = None  # (P, Hkv, D) or (B, P, Hkv, D): attended to by a second, gated softmax
    prompt_v: Tensor | None = None
    prompt_gate: Tensor | None = None  # (H,), as it multiplies
    features: Tensor | None = None  # (B, Nv, Dv) of a frozen encoder, as the call was given them
    visual: Tensor | None = None  # what the model's visual socket made of them


class CausalAttention(nn.Module):
    """The attend socket's default: causal attention, within chunks of the sequence if any. It has no parameters."""

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = chunk

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: AttendContext) -> Tensor:
        cache, layer = ctx.cache, ctx.layer
        prompts = {"prompt_k": ctx.prompt_k, "prompt_v": ctx.prompt_v, "prompt_gate": ctx.prompt_gate}
        if cache is not None:
            cache.append(layer, k, v)
            if cache.used > q.shape[1]:  # older tokens stand in the cache
                knobs = {"lengths": cache.lengths, "chunk": self.chunk, "scale": ctx.scale}
                return ops.attention_decode(q, cache.k[layer], cache.v[layer], **knobs, **prompts)
        packed = {"cu_seqlens_q": ctx.cu_seqlens, "cu_seqlens_k": ctx.cu_seqlens}
        return ops.attention(q, k, v, mask=ctx.mask, chunk=self.chunk, scale=ctx.scale, **packed, **prompts)


class Attention(nn.Module):
    """x (B, T, C) -> (B, T, C): project, rotate, attend, project."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.dim, heads, bias=bias)
        self.k_proj = nn.Linear(config.dim, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.dim, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.dim, bias=config.attention_bias)
        self.rotates = layer not in config.nope_layers
        self.attend = CausalAttention(config.attention_chunk if self.rotates else None)
        if config.qk_norm == "before_rope":
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, ctx: AttendContext) -> Tensor:
        B, T, _ = x.shape
        q_raw, k_raw, v = (
            project(x).view(B, T, -1, self.config.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm == "before_rope":
            q_raw, k_raw = self.q_norm(q_raw), self.k_norm(k_raw)
        q, k = self.place(q_raw, k_raw, ctx)
        ctx = ctx._replace(q_raw=q_raw, k_raw=k_raw, layer=self.layer, projections=(self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q, k, v, x, ctx).reshape(B, T, -1))

    def place(self, q: Tensor, k: Tensor, ctx: AttendContext) -> tuple[Tensor, Tensor]:
        """q and k as their positions want them: rotated, or in a NoPE layer q by its position's temperature."""
        c = self.config
        if self.rotates:
            q, k = ops.rope(q, k, ctx.cos, ctx.sin, layout=c.rope_layout)
            if c.qk_norm == "after_rope":
                q, k = (ops.rms_norm(t, None, eps=c.norm_eps) for t in (q, k))
        elif c.attn_scale:
            steps = ((ctx.positions.float() + 1) / c.floor_scale).floor()
            q = (q * (1 + c.attn_scale * steps.log1p())[..., None, None]).to(q.dtype)
        return q, k


class FeedForward(nn.Module):
    """down(silu(gate(x))·up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_dim or config.hidden_dim
        self.gate_proj = nn.Linear(config.dim, hidden_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, hidden_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def mixture(config: LlamaConfig) -> MoE:
    """The experts of one layer."""
    m = config.moe
    return MoE(
        config.dim, m.hidden_dim, m.n_experts, m.top_k, score=m.score, renormalize=m.renormalize,
        scale_input=m.scale_input, shared_expert=FeedForward(config, m.shared_dim) if m.shared_dim else None,
        shared_gate=m.shared_gate, balance_loss=m.balance_loss, z_loss=m.z_loss,
    )  # fmt: skip


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward.

    The residual stream is x + delta: what a block adds last is left to the next norm, which reads it anyway.
    """

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = mixture(config) if config.moe and config.moe.has(layer) else FeedForward(config)

    def forward(self, x: Tensor, delta: Tensor | None, ctx: AttendContext) -> tuple[Tensor, Tensor]:
        h, x = (self.input_layernorm(x), x) if delta is None else self.input_layernorm(delta, residual=x)
        h, x = self.post_attention_layernorm(self.self_attn(h, ctx), residual=x)
        return x, self.mlp(h)


class Llama(nn.Module):
    """A LLaMA. Built under `torch.device("meta")` it costs no memory; `from_pretrained` fills such a one.

    `checkpoint_activations` keeps only the blocks' inputs for the backward, x and delta of each, and computes the rest
    again, to the same bits.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_module("visual", None)
        self.register_parameter("prefix", None)
        self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self) -> None:
        """N(0, 0.02²), and for what writes into the residual stream the same over sqrt(2·n_layers) (GPT-2)."""
        for name, module in self.named_modules():
            std, deep = 0.02, 0.02 / (2 * self.config.n_layers) ** 0.5
            if type(module) in (nn.Linear, nn.Embedding, Router):
                nn.init.normal_(module.weight, std=deep if name.endswith(("o_proj", "down_proj")) else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif type(module) is Experts:
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=deep)

    def tie_weights(self) -> None:
        """Makes lm_head and the embedding one parameter where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        path,
        *,
        quantize: str | None = None,
        quantize_head: bool = False,
        double_quant: bool = False,
        dtype=None,
    ) -> "Llama":
        """Loads a checkpoint: see `llamakern.checkpoint.from_pretrained`."""
        from llamakern.checkpoint import from_pretrained

        return from_pretrained(
            path, quantize=quantize, quantize_head=quantize_head, double_quant=double_quant, dtype=dtype
        )

    def save_pretrained(self, path) -> None:
        """Writes a Hugging Face folder: see `llamakern.checkpoint_save.save_pretrained`."""
        from llamakern.checkpoint_save import save_pretrained

        save_pretrained(self, path)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for `batch` rows of at most `max_len` tokens, in the dtype that keys will have.

        It has room for the virtual tokens of a prefix too.
        """
        c, like = self.config, self.embed_tokens.weight
        dtype = autocast_dtype(like) or like.dtype
        max_len += 0 if self.prefix is None else self.prefix.shape[0]
        heads = [kept_heads(layer.self_attn.attend, c) for layer in self.layers]
        return KVCache(heads, batch, max_len, dtype=dtype, device=like.device)

    def forward(
        self,
        tokens: Tensor,  # (B, T) integer
        *,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,  # (B,)
        positions: Tensor | None = None,  # (T,) or (B, T)
        cu_seqlens: Tensor | None = None,  # int32 (n + 1,)
        mask: Tensor | None = None,  # bool, broadcastable to (B, H, T, S)
        inputs_embeds: Tensor | None = None,  # (B, T, C)
        features: Tensor | None = None,  # (B, Nv, Dv)
    ) -> Tensor:  # (B, T, V)
        """Logits. With a cache the tokens continue what it holds and are added to it, and no gradient is recorded.

        `lengths` says how many of the T tokens of each row are real, the rest being padding on the right.
        Without `positions` they count from the start of each row, or of each packed sequence of `cu_seqlens` (B = 1).
        A negative token is a placeholder, as for a patch of an image: its row of `inputs_embeds` stands in its place.
        `features` are those of a frozen encoder for each row, for a method that takes them; with a cache they are given
        at every call. ValueError where shapes disagree, the cache is full, a cache meets `cu_seqlens` or `mask`, or
        features meet `cu_seqlens`.
        """
        knobs = {"lengths": lengths, "positions": positions, "cu_seqlens": cu_seqlens, "mask": mask}
        more = {"inputs_embeds": inputs_embeds, "features": features}
        with recorded(cache):
            return self.lm_head(self.hidden(tokens, cache=cache, **knobs, **more))

    def hidden(
        self,
        tokens,
        *,
        cache=None,
        lengths=None,
        positions=None,
        cu_seqlens=None,
        mask=None,
        inputs_embeds=None,
        features=None,
    ) -> Tensor:
        """What `lm_head` sees, (B, T, C): the same arguments as `forward`."""
        check_call(tokens, cache, positions, cu_seqlens, mask, features)
        T = tokens.shape[1]
        x, delta, laid = self.embed(tokens, inputs_embeds), None, None
        started, P = cache is not None and cache.used > 0, 0 if self.prefix is None else self.prefix.shape[0]
        if positions is None:
            positions = default_positions(T, cache, cu_seqlens, tokens.device)
        elif started:
            positions = positions + P
        if P and not started:
            laid = lay(self.prefix, x, positions, cu_seqlens, mask)
            x, positions, cu_seqlens, mask = laid[:4]
        cos, sin = cos_sin(self.config, positions)
        visual = None if features is None or self.visual is None else self.visual(features)
        where = {"cache": cache, "positions": positions, "cu_seqlens": cu_seqlens, "mask": mask, "cos": cos, "sin": sin}
        ctx = AttendContext(**where, features=features, visual=visual)
        with recorded(cache), nullcontext() if cache is None else cache.growing(x.shape[1]):
            for layer in self.layers:
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x, delta = checkpoint(layer, x, delta, ctx, use_reentrant=False)
                else:
                    x, delta = layer(x, delta, ctx)
            if cache is not None and lengths is not None:
                cache.lengths += lengths.to(torch.int32) - T  # the padding is overwritten by the next tokens
            h = self.norm(x) if delta is None else self.norm(delta, residual=x)[0]
            return h if laid is None else laid.drop(h, P)

    def embed(self, tokens: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """What the first block sees, (B, T, C)."""
        if inputs_embeds is None:
            return self.embed_tokens(tokens)
        shape = [*tokens.shape, self.config.dim]
        if list(inputs_embeds.shape) != shape:
            raise ValueError(f"model: inputs_embeds must have shape {shape}, got {list(inputs_embeds.shape)}")
        x = self.embed_tokens(tokens.clamp_min(0))
        return torch.where((tokens < 0)[..., None], inputs_embeds.to(x.dtype), x)

    def loss(self, tokens, labels, *, positions=None, cu_seqlens=None, features=None, reduction="mean") -> Tensor:
        """Cross-entropy of the next token: labels[b, t] is the target at position t, -100 is ignored. float32.

        features (B, Nv, Dv): see `forward`. In training the experts' auxiliary losses are added, if the configuration
        asks for them: to the mean as they are, to the sum once for each target.
        """
        h = self.hidden(tokens, positions=positions, cu_seqlens=cu_seqlens, features=features)
        if type(self.lm_head) is nn.Linear:
            loss = ops.linear_cross_entropy(h, self.lm_head.weight, labels, reduction=reduction)
        else:
            loss = F.cross_entropy(self.lm_head(h).flatten(0, 1).float(), labels.flatten(), reduction=reduction)
        extra = auxiliary_loss(self) if self.config.moe and self.training and reduction != "none" else None
        if extra is not None:
            loss = loss + (extra if reduction == "mean" else extra * (labels != -100).sum())
        return loss.view_as(labels) if reduction == "none" else loss


def kept_heads(attend: nn.Module | None, config: LlamaConfig) -> tuple[int, int]:
    """Heads and head_dim of the keys that this attend module leaves in a cache: those of the outermost that says so."""
    while attend is not None:
        if hasattr(attend, "kept_heads"):
            return attend.kept_heads()
        attend = getattr(attend, "base", None)
    return config.n_kv_heads, config.head_dim


def recorded(cache: KVCache | None):
    """The scope of a call: a cache is written in place, which has no gradient."""
    return torch.set_grad_enabled(cache is None and torch.is_grad_enabled())


def default_positions(T: int, cache: KVCache | None, cu_seqlens: Tensor | None, device) -> Tensor:
    """Positions that count from each row's (B, T) or each packed sequence's (T,) first token."""
    t = torch.arange(T, device=device)
    if cache is not None:
        return cache.lengths[:, None] + t
    if cu_seqlens is not None:
        starts = cu_seqlens.to(t.dtype)
        return t - starts[torch.searchsorted(starts, t, right=True) - 1]
    return t


def check_call(tokens, cache, positions, cu_seqlens, mask, features) -> None:
    """What the ops cannot say better themselves."""
    if tokens.dim() != 2:
        raise ValueError(f"model: tokens must have shape (B, T), got {list(tokens.shape)}")
    B, T = tokens.shape
    if positions is not None and tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(f"model: positions must have shape ({T},) or ({B}, {T}), got {list(positions.shape)}")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"model: tokens must have one row with cu_seqlens, got {B}")
    if cache is not None and (cu_seqlens is not None or mask is not None):
        raise ValueError("model: cu_seqlens and mask must be None with a cache")
    if cache is not None and cache.lengths.shape[0] != B:
        raise ValueError(f"model: cache must have batch {B}, got {cache.lengths.shape[0]}")
    if features is not None and (features.dim() != 3 or features.shape[0] != B):
        raise ValueError(f"model: features must have shape ({B}, Nv, Dv), got {list(features.shape)}")
    if features is not None and cu_seqlens is not None:
        raise ValueError("model: cu_seqlens must be None with features, which belong to rows")
