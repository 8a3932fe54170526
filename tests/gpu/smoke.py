"""A call of each op on the GPU, small and with odd sizes, for compute-sanitizer to watch: not a test of results."""

import torch

from llamakern import ops

torch.manual_seed(0)
torch.set_default_device("cuda")


def made(dtype, *shapes, scale=1.0):
    return [(torch.randn(*shape) * scale).to(dtype).requires_grad_() for shape in shapes]


def backward(y, inputs):
    torch.autograd.grad(y, inputs, torch.randn_like(y))


def rows(dtype):
    x, s, w, gate, up = made(dtype, (37, 72), (37, 72), (72,), (37, 33), (37, 33))
    backward(ops.rms_norm(x, w, eps=1e-5), (x, w))
    backward(ops.rms_norm(x, w, eps=1e-5, residual=s)[0], (x, w, s))
    backward(ops.swiglu(gate, up), (gate, up))
    scale, shift = made(torch.float32, (33,), (33,))
    backward(ops.scale_shift(gate, scale, shift), (gate, scale, shift))
    (head,), labels = made(dtype, (150, 72)), torch.randint(0, 150, (37,))
    labels[::3] = -100
    backward(ops.linear_cross_entropy(x, head, labels), (x, head))


def attention(dtype):
    q, k, v = qkv = made(dtype, (2, 37, 4, 40), (2, 37, 2, 40), (2, 37, 2, 40))
    angle = torch.randn(37, 20)
    backward(ops.rope(q, k, angle.cos(), angle.sin())[0], (q,))
    backward(ops.attention(*qkv), qkv)
    prompts = made(dtype, (10, 2, 40), (10, 2, 40)) + made(torch.float32, (4,))
    knobs = dict(zip(("prompt_k", "prompt_v", "prompt_gate"), prompts, strict=True))
    backward(ops.attention(*qkv, **knobs), (*qkv, *prompts))
    x, *learned = made(dtype, (2, 37, 24)) + made(torch.float32, (5, 24), (80, 5), (40, 2, 40), (2,))
    for switch in ({}, {"extra_rope": "both", "prompt_attention": "full_width"}):
        y = ops.excitor_keys(x, k, *learned, cos=angle.cos(), sin=angle.sin(), **switch)
        backward(y, (x, k, *learned))
    with torch.no_grad():
        ops.excitor_keys(x[:, :1], k[:, :1], *learned)
    lengths = torch.tensor([37, 5], dtype=torch.int32)
    with torch.no_grad():
        ops.cache_append_(k.detach(), v.detach(), k[:, :1], v[:, :1], lengths)
        ops.attention_decode(q[:, :1], k, v, lengths=lengths)
        ops.attention_decode(q[:, :1], k, v, lengths=lengths, **knobs)


def linears(dtype):
    with torch.no_grad():
        packed, absmax = ops.nf4_quantize(torch.randn(50, 128).to(dtype))
        ops.nf4_double_quantize(absmax)
        ops.nf4_dequantize(packed, absmax, dtype=dtype)
    w, a, b = made(dtype, (50, 128), (5, 128), (50, 5))
    for M in (1, 37):
        (x,) = made(dtype, (M, 128))
        backward(ops.nf4_linear(x, packed, absmax), (x,))
        backward(ops.nf4_lora_linear(x, packed, absmax, a, b, scale=0.5), (x, a, b))
        backward(ops.lora_linear(x, w, a, b, scale=0.5), (x, w, a, b))


def experts(dtype, M=300, E=40, C=64, F=32, R=5):
    x, up, down = made(dtype, (M, C), (E, 2 * F, C), (E, C, F))
    lora = made(dtype, (E, R, C), (E, 2 * F, R), (E, R, F), (E, C, R))
    (logits,) = made(torch.float32, (M, E))
    for top_k in (1, 9):  # pairs that one block sorts, and several
        weights, chosen = ops.moe_route(logits, top_k=top_k, renormalize=top_k > 1)
        y = ops.moe_mlp(x, weights, chosen, up, down, lora=lora, scale_input=top_k == 1)
        backward(y, (x, logits, up, down, *lora))
    packed, absmax = (torch.stack(t) for t in zip(*map(ops.nf4_quantize, up.detach()), strict=True))
    for counts in (torch.arange(E) % 3, torch.full((E,), 7)):  # streamed, and by tiles
        offsets = torch.cat((counts[:1] * 0, counts.cumsum(0))).int()
        (x,) = made(dtype, (int(counts.sum()), C))
        backward(ops.nf4_grouped_linear(x, packed, absmax, offsets, lora_a=lora[0], lora_b=lora[1]), (x, *lora[:2]))


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for room in (rows, attention, linears, experts):
        room(dtype)
torch.cuda.synchronize()
print("every op ran")
