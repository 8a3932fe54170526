"""A call of each op on the GPU, small and with odd sizes, for compute-sanitizer to watch: not a test of results."""

import torch

from llamakern import ops

torch.manual_seed(0)
torch.set_default_device("cuda")


def leaves(*tensors):
    return [t.requires_grad_() for t in tensors]


def backward(y, inputs):
    torch.autograd.grad(y, inputs, torch.randn_like(y))


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, w, gate, up = leaves(*(torch.randn(*shape, dtype=dtype) for shape in ((37, 72), (72,), (37, 33), (37, 33))))
    backward(ops.rms_norm(x, w, eps=1e-5), (x, w))
    backward(ops.swiglu(gate, up), (gate, up))
    scale, shift = leaves(torch.randn(33), torch.randn(33))
    backward(ops.scale_shift(gate, scale, shift), (gate, scale, shift))
    q, k, v = leaves(torch.randn(2, 37, 4, 40, dtype=dtype), *torch.randn(2, 2, 37, 2, 40, dtype=dtype).unbind())
    angle = torch.randn(37, 20)
    backward(ops.rope(q, k, angle.cos(), angle.sin())[0], (q,))
    backward(ops.attention(q, k, v), (q, k, v))
    learned = leaves(torch.randn(5, 72), torch.randn(80, 5), torch.randn(40, 2, 40), torch.randn(2))
    words = x.expand(2, 37, 72)
    for switch in ({}, {"extra_rope": "both", "prompt_attention": "full_width"}):
        y = ops.excitor_keys(words, k, *learned, cos=angle.cos(), sin=angle.sin(), **switch)
        backward(y, (x, k, *learned))
    with torch.no_grad():
        ops.excitor_keys(words[:, :1], k[:, :1], *learned)
    lengths = torch.tensor([37, 5], dtype=torch.int32)
    with torch.no_grad():
        ops.cache_append_(k.detach(), v.detach(), k[:, :1], v[:, :1], lengths)
        ops.attention_decode(q[:, :1], k, v, lengths=lengths)
    head, labels = leaves(torch.randn(150, 72, dtype=dtype))[0], torch.randint(0, 150, (37,))
    labels[::3] = -100
    backward(ops.linear_cross_entropy(x, head, labels), (x, head))
    packed, absmax = ops.nf4_quantize(torch.randn(50, 128, dtype=dtype))
    ops.nf4_dequantize(packed, absmax, dtype=dtype)
    a, b = leaves(torch.randn(5, 128, dtype=dtype), torch.randn(50, 5, dtype=dtype))
    for M in (1, 37):
        (y,) = leaves(torch.randn(M, 128, dtype=dtype))
        backward(ops.nf4_linear(y, packed, absmax), (y,))
        backward(ops.nf4_lora_linear(y, packed, absmax, a, b, scale=0.5), (y, a, b))
    logits = leaves(torch.randn(300, 40))[0]
    rows = leaves(torch.randn(300, 64, dtype=dtype))[0]
    up, down = torch.randn(40, 64, 64, dtype=dtype), torch.randn(40, 64, 32, dtype=dtype)
    lora = leaves(*(torch.randn(40, *shape, dtype=dtype) for shape in ((5, 64), (64, 5), (5, 32), (64, 5))))
    for top_k in (1, 9):  # pairs that one block sorts, and several
        weights, experts = ops.moe_route(logits, top_k=top_k, renormalize=top_k > 1)
        dense = leaves(up.clone(), down.clone())
        y = ops.moe_mlp(rows, weights, experts, *dense, lora=lora, scale_input=top_k == 1)
        backward(y, (rows, logits, *dense, *lora))
    packed, absmax = (torch.stack(t) for t in zip(*map(ops.nf4_quantize, up), strict=True))
    for counts in (torch.arange(40) % 3, torch.full((40,), 7)):  # streamed, and by tiles
        offsets = torch.cat((counts[:1] * 0, counts.cumsum(0))).int()
        (y,) = leaves(torch.randn(int(counts.sum()), 64, dtype=dtype))
        backward(ops.nf4_grouped_linear(y, packed, absmax, offsets, lora_a=lora[0], lora_b=lora[1]), (y, *lora[:2]))
torch.cuda.synchronize()
print("every op ran")
