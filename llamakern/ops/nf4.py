"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E), and the linear over a weight stored in it.

    w[i] = codebook[code[i]]·absmax[i / block_size]            byte k holds element 2k in its high nibble
    absmax[j] = codebook8[absmax_code[j]]·absmax_scale[j / 256] + absmax_offset            (double quantisation)
    y = x Wᵀ + bias            dx = dy W

The bytes are those of bitsandbytes (quant_type "nf4"); blocks run over the row-major flattened weight.
Shapes: M tokens, N out_features, K in_features.
"""

import torch
from torch import Tensor

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A value takes the number of thresholds that it strictly exceeds. They are bitsandbytes' CUDA constants: in the last
# digit some differ from the float32 midpoints.
THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


def nf4_quantize_reference(w, *, block_size=64):
    """What the op means, in plain PyTorch, for K divisible by block_size."""
    N, K = w.shape
    blocks = w.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax)[:, None]
    code = torch.bucketize(scaled.nan_to_num(-1.0), torch.tensor(THRESHOLDS)).reshape(N, K).to(torch.uint8)
    return (code[:, 0::2] << 4) | code[:, 1::2], absmax.reshape(N, K // block_size)


def nf4_dequantize_reference(weight, absmax, *, block_size=64, dtype=torch.float32):
    """What the op means, in plain PyTorch, for K divisible by block_size."""
    code = torch.stack((weight >> 4, weight & 15), -1).flatten(-2).long()
    scale = absmax.repeat_interleave(block_size, -1)
    return (torch.tensor(CODEBOOK, device=weight.device)[code] * scale).to(dtype)


def nf4_linear_reference(x, weight, absmax, bias=None, *, block_size=64):
    """What the op means, in plain PyTorch."""
    y = x @ nf4_dequantize_reference(weight, absmax, block_size=block_size, dtype=x.dtype).T
    return y if bias is None else y + bias
