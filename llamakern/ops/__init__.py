"""LLaMA's kernels as torch ops. Tensors are positional, knobs keyword-only; each `<op>_reference` says what `<op>` means."""

from llamakern.ops.rope import rope as rope
from llamakern.ops.attention import attention as attention
from llamakern.ops.attention import attention_decode as attention_decode
from llamakern.ops.attention import cache_append_ as cache_append_
from llamakern.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
