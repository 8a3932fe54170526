"""One more token for each row against the cache: block by block in one call each where the model's make-up allows it.

A block is decoded in one call if it is made of nothing but the plain parts over NF4 weights on a CPU: no adapter, no
other attend module, no bias, no hook. The results are the same to the last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from llamakern.model import Attention, Block, CausalAttention, FeedForward, KVCache, Llama
from llamakern.nn import NF4Linear, RMSNorm
from llamakern.ops.block import block_decode
from llamakern.rotary import cos_sin


def decoder(model, cache: KVCache, **knobs) -> Callable[[Tensor], Tensor]:
    """fn(tokens (B,)) -> what lm_head sees, (B, C). Each call adds one token to every row of the cache.

    knobs: what else each call of `model.hidden` is given.
    """
    if knobs or not is_plain(model, cache):
        return lambda tokens: model.hidden(tokens[:, None], cache=cache, **knobs)[:, -1]
    max_len = cache.k[0].shape[1]
    cos, sin = cos_sin(model.config, torch.arange(max_len, device=cache.k[0].device))
    blocks = [arguments(layer) for layer in model.layers]

    def hidden(tokens: Tensor) -> Tensor:
        with cache.growing(1):
            x = model.embed_tokens(tokens[:, None])
            for layer, lists, knobs in blocks:
                x = block_decode(x, *lists, cos, sin, cache.k[layer], cache.v[layer], cache.lengths, *knobs)
            return model.norm(x)[:, -1]

    return hidden


def linears(layer: Block) -> list[torch.nn.Module]:
    a, f = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj]


def arguments(layer: Block) -> tuple[int, list, list]:
    """Which of the cache's layers a block writes, the lists of tensors that `block_decode` takes, and its knobs."""
    packed, c = [linear.packed for linear in linears(layer)], layer.self_attn.config
    lists = [[layer.input_layernorm.weight, layer.post_attention_layernorm.weight]]
    lists += [[p[name] for p in packed] for name in ("weight", "absmax")]
    nested = packed[0]["absmax_scale"] is not None
    lists += [[p[name] for p in packed] if nested else [] for name in ("absmax_scale", "absmax_offset")]
    knobs = [
        c.n_heads,
        c.hidden_dim,
        packed[0]["block_size"],
        layer.input_layernorm.eps,
        c.rope_layout == "interleaved",
    ]
    return layer.self_attn.layer, lists, knobs


def is_plain(model, cache: KVCache) -> bool:
    """Whether every block is what `block_decode` computes."""
    if type(model) is not Llama or cache.k[0].device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if is_touched(model) or "hidden" in vars(model):
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    return all(is_plain_block(layer, cache.k[0].dtype) for layer in model.layers)


def is_plain_block(layer, dtype: torch.dtype) -> bool:
    if type(layer) is not Block or any(is_touched(m) for m in layer.modules()):
        return False
    attention, norms = layer.self_attn, [layer.input_layernorm, layer.post_attention_layernorm]
    parts = [(attention, Attention), (layer.mlp, FeedForward), (attention.attend, CausalAttention)]
    parts += [(norm, RMSNorm) for norm in norms]
    if not all(type(module) is kind for module, kind in parts):
        return False
    c = attention.config
    if c.qkv_bias or c.qk_norm or c.nope_layers or attention.attend.chunk is not None:
        return False
    if not all(norm.weight.dtype in (dtype, torch.float32) and norm.eps == norms[0].eps for norm in norms):
        return False
    some = linears(layer)
    if not all(type(linear) is NF4Linear and linear.bias is None for linear in some):
        return False
    return len({(linear.block_size, linear.double_quant) for linear in some}) == 1


def is_touched(module: torch.nn.Module) -> bool:
    """Whether a call does more than the class's own forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
        return True
    return "forward" in vars(module)
