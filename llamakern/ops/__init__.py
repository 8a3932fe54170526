"""LLaMA's kernels as torch ops. Tensors are positional, knobs keyword-only; `<op>_reference` says what `<op>` means."""

from llamakern.ops.attention import attention as attention
from llamakern.ops.attention import attention_decode as attention_decode
from llamakern.ops.attention import cache_append_ as cache_append_
from llamakern.ops.block import nf4_block_decode_ as nf4_block_decode_
from llamakern.ops.excitor import excitor_keys as excitor_keys
from llamakern.ops.grouped import grouped_linear as grouped_linear
from llamakern.ops.grouped import nf4_grouped_linear as nf4_grouped_linear
from llamakern.ops.lora import lora_linear as lora_linear
from llamakern.ops.lora import nf4_lora_linear as nf4_lora_linear
from llamakern.ops.loss import linear_cross_entropy as linear_cross_entropy
from llamakern.ops.moe import moe_mlp as moe_mlp
from llamakern.ops.moe import moe_route as moe_route
from llamakern.ops.nf4 import nf4_dequantize as nf4_dequantize
from llamakern.ops.nf4 import nf4_double_quantize as nf4_double_quantize
from llamakern.ops.nf4 import nf4_linear as nf4_linear
from llamakern.ops.nf4 import nf4_quantize as nf4_quantize
from llamakern.ops.norm import rms_norm as rms_norm
from llamakern.ops.rope import rope as rope
from llamakern.ops.scale import scale_shift as scale_shift
from llamakern.ops.sdpa import scaled_dot_product_attention as scaled_dot_product_attention
from llamakern.ops.swiglu import swiglu as swiglu
