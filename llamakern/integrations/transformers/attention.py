"""The attention "llamakern" of transformers' AttentionInterface, and the mask that it reads.

transformers hands over q (B, H, T, D) and k, v (B, Hkv, S, D), strided views of (B, T, H, D), and a bool mask
(B, 1, T, S), True = attend, or None where the tokens are plainly causal. Without a mask function of that name it would
hand over None always, and padding would be attended.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llamakern import ops

NAME = "llamakern"
# What other models of transformers ask of their attention, by the keyword that brings it.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache", "output_attentions")


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,
    attention_mask: Tensor | None,  # (B, 1, T, S)
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:  # (B, T, H, D)
    """softmax(scaling·q kᵀ) v; a query that sees no key (left padding) gives 0 and gradient 0, as with "sdpa".

    Raises NotImplementedError for dropout and for what needs the probabilities or other scores.
    """
    refuse(module, dropout, kwargs)
    T, S = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        y = ops.scaled_dot_product_attention(query, key, value, attention_mask[..., :S], scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = T > 1 and attention_mask is None and causal
    if causal and S > T:  # the first tokens of a static cache: the keys behind them are not written yet
        key, value = key[:, :, :T], value[:, :, :T]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :S]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return ops.attention(q, k, v, mask=attention_mask, causal=causal, scale=scaling), None


def refuse(module: nn.Module, dropout: float, kwargs: dict) -> None:
    """Raises NotImplementedError for what would change the result, had it been ignored."""
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None and kwargs[name] is not False]
    if dropout > 0:
        asked.append("attention_dropout")
    if getattr(getattr(module, "config", None), "output_attentions", False):
        asked.append("output_attentions")
    if asked:
        raise NotImplementedError(
            f'attention "llamakern": {asked[0]} is not built; set_attn_implementation("eager") has it'
        )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
