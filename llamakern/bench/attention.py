"""Attention against torch's scaled_dot_product_attention: forward, backward, decoding over a cache, prompts.

torch gets its inputs as it likes them best, contiguous (B, H, T, D); in decoding the query heads of a kv head stand as
queries of one head, which it runs much faster than with enable_gqa, and two plain matmuls race too. On a GPU each of
torch's backends races by name beside the one that it chooses; "efficient" knows no groups and finds k and v repeated.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llamakern import ops
from llamakern.bench.cases import Case
from llamakern.bench.clock import Rotating, on_gpu, relative_error
from llamakern.ops.attention import attention_reference

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def by_backend(call):
    """call(backend) -> what is to be raced, for torch's own choice (None) and on a GPU for each of its backends; where
    one refuses, its reason."""
    found = {"torch": call(None)}
    for name in BACKENDS if on_gpu() else ():
        try:
            found[f"torch {name}"] = call(name)
        except RuntimeError as error:
            found[f"torch {name}"] = str(error).splitlines()[0]
    return found


def causal(backend, q, k, v):
    """torch's, on (B, H, T, D)."""
    groups = {"is_causal": True, "enable_gqa": k.shape[1] != q.shape[1]}
    if backend is None:
        return sdpa(q, k, v, **groups)
    with sdpa_kernel(BACKENDS[backend]):
        return sdpa(q, k, v, **groups)


def inputs_of(backend, q, k, v):
    """In torch's layout, as the backend likes them."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    return [q, *(t.repeat_interleave(group, 1) if backend == "efficient" else t for t in (k, v))]


def rows(table, label, dtype, *, B=1, T, H, Hkv, D):
    q, k, v, dy = (torch.randn(B, T, heads, D).to(dtype) for heads in (H, Hkv, Hkv, H))

    def forward(backend):
        return partial(causal, backend, *inputs_of(backend, q, k, v))

    def backward(backend):
        leaves = [t.requires_grad_() for t in inputs_of(backend, q, k, v)]
        return partial(torch.autograd.grad, causal(backend, *leaves), leaves, dy_theirs, retain_graph=True)

    sizes = {"flops": 2 * B * H * D * T * (T + 1), "bytes_moved": 2 * B * T * (H + Hkv) * D * dtype.itemsize}
    table.row(
        f"{label} forward",
        {"ours": lambda: ops.attention(q, k, v)} | by_backend(forward),
        **sizes,  # the visible half of two matmuls
        error=forward_error(q, k, v),
        dtype=dtype,
    )
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    y = ops.attention(*ours)
    dy_theirs = dy.transpose(1, 2).contiguous()
    table.row(
        f"{label} backward",
        {"ours": lambda: torch.autograd.grad(y, ours, dy, retain_graph=True)} | by_backend(backward),
        flops=sizes["flops"] * 5 // 2,
        bytes_moved=2 * sizes["bytes_moved"],
        error=backward_error(ours, y, dy),
        dtype=dtype,
    )


def one_group(t, group):
    """The heads of the first sequence's first kv head, or that kv head: what float64 has the time to check."""
    return t[:1, :, :group]


def forward_error(q, k, v):
    group = q.shape[2] // k.shape[2]
    few = slice(0, 2048)  # causal: later tokens do not change what the first ones see
    truth = attention_reference(*(one_group(t[:, few], n).double() for t, n in ((q, group), (k, 1), (v, 1))))
    return relative_error(one_group(ops.attention(q, k, v)[:, few], group), truth)


def backward_error(leaves, y, dy):
    """Of dq of the first kv head's queries, over the first tokens."""
    group, few = leaves[0].shape[2] // leaves[1].shape[2], slice(0, 2048)
    dq = torch.autograd.grad(y, leaves, dy, retain_graph=True)[0]
    q, k, v = (one_group(t.detach()[:, few], n).double() for t, n in zip(leaves, (group, 1, 1), strict=True))
    q.requires_grad_()
    truth = torch.autograd.grad(attention_reference(q, k, v), q, one_group(dy[:, few], group).double())[0]
    return relative_error(one_group(dq[:, few], group), truth)


def decode_rows(table, label, dtype, *, B=1, S, H, Hkv, D):
    bytes_moved = 2 * B * S * Hkv * D * dtype.itemsize
    caches = Rotating(lambda: [torch.randn(B, S, Hkv, D).to(dtype) for _ in range(2)], bytes_each=bytes_moved)
    q, lengths = torch.randn(B, 1, H, D).to(dtype), torch.full((B,), S, dtype=torch.int32)
    grouped = q.view(B, Hkv, H // Hkv, D)

    def theirs():  # the same random bytes, taken as the layout (B, Hkv, S, D)
        return [t.view(B, Hkv, S, D) for t in caches()]

    def matmuls():
        k, v = theirs()
        return (grouped @ k.transpose(-1, -2)).mul_(D**-0.5).softmax(-1) @ v

    def decode(backend):
        def run():
            with nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend]):
                return sdpa(grouped, *theirs())

        return run

    k, v = caches()
    truth = attention_reference(q.double(), k.double(), v.double(), causal=False)
    table.row(
        f"{label} decode",
        {
            "ours": lambda: ops.attention_decode(q, *caches(), lengths=lengths),
            **by_backend(decode),
            "two matmuls": matmuls,
        },
        flops=4 * B * S * H * D,
        bytes_moved=bytes_moved,
        error=relative_error(ops.attention_decode(q, k, v, lengths=lengths), truth),
        dtype=dtype,
    )


def prompt_rows(table, label, dtype, *, B=1, T, H, Hkv, D, P=10):
    """LLaMA-Adapter's prompts: against ours without them, and against torch with a second attention over them."""
    q, k, v, dy = (torch.randn(B, T, heads, D).to(dtype) for heads in (H, Hkv, Hkv, H))
    pk, pv, gate = torch.randn(P, Hkv, D).to(dtype), torch.randn(P, Hkv, D).to(dtype), torch.linspace(-1, 1, H)

    def prompted(q, k, v, pk, pv, gate):
        return ops.attention(q, k, v, prompt_k=pk, prompt_v=pv, prompt_gate=gate)

    def two(q, k, v, pk, pv, gate):  # in torch's layout
        grouped = {"enable_gqa": Hkv != H}
        prompts = sdpa(q, *(t.transpose(0, 1).expand(B, -1, -1, -1) for t in (pk, pv)), **grouped)
        return sdpa(q, k, v, is_causal=True, **grouped) + gate.to(dtype)[:, None, None] * prompts

    ours = (q, k, v, pk, pv, gate)
    theirs = (*(t.transpose(1, 2).contiguous() for t in (q, k, v)), pk, pv, gate)
    contestants = {"ours": (prompted, ours), "without prompts": (ops.attention, (q, k, v)), "torch": (two, theirs)}
    sizes = {"flops": 2 * B * H * D * T * (T + 1 + 2 * P), "bytes_moved": 2 * B * T * (H + Hkv) * D * dtype.itemsize}
    table.row(
        f"{label} forward",
        {name: partial(fn, *inputs) for name, (fn, inputs) in contestants.items()},
        **sizes,
        error=relative_error(prompted(*ours), attention_reference(*to_double(ours[:3]), **prompts_of(ours))),
        dtype=dtype,
    )
    steps = {}
    for name, (fn, inputs) in contestants.items():
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, into = fn(*leaves), dy.transpose(1, 2).contiguous() if name == "torch" else dy
        steps[name] = partial(torch.autograd.grad, y, leaves, into, retain_graph=True)
    backward = {"flops": sizes["flops"] * 5 // 2, "bytes_moved": 2 * sizes["bytes_moved"]}
    table.row(f"{label} backward", steps, **backward, dtype=dtype)


def to_double(tensors):
    return [t.double() for t in tensors]


def prompts_of(inputs):
    return dict(zip(("prompt_k", "prompt_v", "prompt_gate"), to_double(inputs[3:]), strict=True))


def shape(T, H, Hkv, D, B=1):
    return {"B": B, "T": T, "H": H, "Hkv": Hkv, "D": D}


def cache(S, H, Hkv, D, B=1):
    return {"B": B, "S": S, "H": H, "Hkv": Hkv, "D": D}


CASES = (
    Case(
        "attention",
        rows,
        {
            "llama3-8b T=2048": shape(2048, 32, 8, 128),
            "llama3-8b T=512": shape(512, 32, 8, 128),
            "llama3-8b T=128": shape(128, 32, 8, 128),
            "llama-7b T=2048": shape(2048, 32, 32, 128),
            "llama3.2-1b T=512": shape(512, 32, 8, 64, B=2),
            "storyllama T=256": shape(256, 8, 8, 48, B=4),
        },
        axis="T",  # a quarter of llama3-8b's heads, so that torch's longest takes seconds and not a minute
        curve={f"llama3-8b/4 T={T}": shape(T, 8, 2, 128) for T in (512, 1024, 2047, 2048, 4096, 8192, 16384)},
        gpu={
            **{f"llama3-8b T={T}": shape(T, 32, 8, 128) for T in (512, 4096, 8192)},
            "llama3-8b T=2048 B=8": shape(2048, 32, 8, 128, B=8),
            "llama-7b T=4096": shape(4096, 32, 32, 128),
            "llama3.2-1b T=4096": shape(4096, 32, 8, 64),
        },
    ),
    Case(
        "attention_decode",
        decode_rows,
        {
            "llama3-8b S=8192": cache(8192, 32, 8, 128),
            "llama3-8b S=512": cache(512, 32, 8, 128),
            "llama-7b S=2048": cache(2048, 32, 32, 128),
            "llama3.2-1b S=4096 B=4": cache(4096, 32, 8, 64, B=4),
            "one kv head S=16384": cache(16384, 8, 1, 128),
        },
        gpu={
            "llama3-8b S=2048": cache(2048, 32, 8, 128),
            "llama3-8b S=32768": cache(32768, 32, 8, 128),
            "llama3-8b S=8192 B=16": cache(8192, 32, 8, 128, B=16),
            "llama-7b S=4096 B=8": cache(4096, 32, 32, 128, B=8),
            "llama3.2-1b S=8192 B=8": cache(8192, 32, 8, 64, B=8),
        },
    ),
    Case(
        "attention_prompts",
        prompt_rows,
        {
            "llama3-8b T=512 P=10": shape(512, 32, 8, 128),
            "llama-7b T=512 P=10": shape(512, 32, 32, 128),
            "llama3.2-1b T=512 P=10": shape(512, 32, 8, 64, B=2),
        },
        gpu={f"llama3-8b T={T} P=10": shape(T, 32, 8, 128) for T in (512, 2048)},
    ),
)
