"""What a backward keeps: outputs are made again instead, with the same bits, and never from what was overwritten."""

import copy
import io

import pytest
import torch
from compare import assert_same_bits

from llamakern import Llama, LlamaConfig, ops, peft
from llamakern.nn import quantize_

M, K, N, R = 6, 64, 8, 4


def inputs(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(M, K, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(K, generator=generator)).to(dtype).requires_grad_()
    return x, y, weight


def linears(dtype=torch.bfloat16):
    """Three linears with LoRA, as q, k and v, over each kind of base, and their adapters."""
    generator = torch.Generator().manual_seed(1)
    adapters = [[torch.randn(*s, generator=generator, requires_grad=True) for s in ((R, K), (N, R))] for _ in range(3)]
    w = torch.randn(N, K, generator=generator)
    packed, dense = ops.nf4_quantize(w), w.to(dtype)
    nf4 = [lambda x, a=a, b=b: ops.nf4_lora_linear(x, *packed, a, b, scale=0.5) for a, b in adapters]
    over_dense = [lambda x, a=a, b=b: ops.lora_linear(x, dense, a, b, scale=0.5) for a, b in adapters]
    return {"nf4": nf4, "dense": over_dense, "adapters": [t for pair in adapters for t in pair]}


SOURCES = {
    "norm": lambda x, y, w: ops.rms_norm(x, w, eps=1e-5),
    "norm-residual": lambda x, y, w: ops.rms_norm(x, w, eps=1e-5, residual=y)[0],
    "norm-no-weight": lambda x, y, w: ops.rms_norm(x, None, eps=1e-5),
    "swiglu": lambda x, y, w: ops.swiglu(x, y),
}


def kept_storages(run):
    """The storages that a forward keeps for its backward."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        return run(), found


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_kept_and_the_same_bits(source, kind, dtype):
    def gradients(note):
        leaves, made = inputs(dtype), linears(dtype)
        h = SOURCES[source](*leaves)
        total, found = kept_storages(
            lambda: sum(f(h if note else h.view_as(h)).float().square().sum() for f in made[kind])
        )
        grads = torch.autograd.grad(total, [*leaves, *made["adapters"]], allow_unused=True)
        return grads, h.untyped_storage().data_ptr() in found

    (noted, kept), (plain, kept_plain) = gradients(True), gradients(False)
    assert kept_plain
    assert kept == (source == "norm-residual" and dtype == torch.float16)  # whose y its rounded sum does not tell
    for a, b in zip(noted, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)


def test_every_backward_makes_it_once_and_lets_it_go():
    made = []
    x, y, _ = inputs()
    h = ops.swiglu(x, y)
    remake = h._llamakern_made_by.remake
    fn = remake.fn
    remake.fn = lambda *t: made.append(1) or fn(*t)
    total = sum(f(h).float().sum() for f in linears()["nf4"])
    first = torch.autograd.grad(total, (x, y), retain_graph=True)
    assert (len(made), remake.value) == (1, None)
    second = torch.autograd.grad(total, (x, y))
    assert (len(made), remake.value) == (2, None)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_a_part_of_the_graph_first():
    x, y, _ = inputs()
    h = ops.swiglu(x, y)
    one, two, three = (f(h).float().square().sum() for f in linears()["nf4"])
    parts = [torch.autograd.grad(t, (x, y), retain_graph=True) for t in (two, one, three, two)]
    whole = torch.autograd.grad(two, (x, y))
    for a, b, c in zip(parts[0], parts[3], whole, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


def test_an_output_that_was_written_is_kept_itself():
    x, y, _ = inputs()
    made = linears()
    f, wanted = made["nf4"][0], (x, y, *made["adapters"][:2])
    h = ops.swiglu(x, y)
    with torch.no_grad():
        h.add_(1)
    grads = torch.autograd.grad(f(h).float().square().sum(), wanted)
    other = ops.swiglu(x, y)
    want = torch.autograd.grad(f((other.detach() + 1) + (other - other.detach())).float().square().sum(), wanted)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


def test_an_input_that_was_written_is_refused():
    x, y, _ = inputs()
    gate = x * 1
    h = ops.swiglu(gate, y)
    total = linears()["nf4"][0](h).sum()
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("note", [False, True])
@pytest.mark.parametrize("of", ["dw", "da", "dw of a sum"])
def test_double_backward_is_refused_and_never_loses_a_part(note, of):
    """Also beside another way to u, where a missing history would only make the sum too small."""
    u, _, weight = inputs(torch.float32)
    w, a, b = (torch.randn(s, requires_grad=True) for s in ((N, K), (R, K), (N, R)))
    x = ops.rms_norm(u, weight, eps=1e-5)
    y = ops.lora_linear(x if note else x.view_as(x), w, a, b, scale=0.5)
    total = y.sum() if of == "dw of a sum" else y.square().sum()
    (g,) = torch.autograd.grad(total, a if of == "da" else w, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(g.square().sum() + u.sum(), u)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_note_is_not_saved(weights_only):
    x, y, _ = inputs()
    h, file = ops.swiglu(x, y), io.BytesIO()
    torch.save(h, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    leaf = copy.deepcopy(h.detach_().requires_grad_())
    for other in (loaded, leaf):
        assert_same_bits(other.detach(), h.detach())
        f = linears()["nf4"][0]
        want = torch.autograd.grad(f(h).float().square().sum(), h)[0]
        assert_same_bits(torch.autograd.grad(f(other).float().square().sum(), other)[0], want)


def test_bytes_that_a_block_keeps():
    """Per token: two sums of the residual stream, q, k, v, the attention's output and lse, gate, up, and each h."""
    config = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=97)
    tokens = torch.randint(97, (2, 33))

    def kept(layers):
        model = quantize_(Llama(config.replace(n_layers=layers)).to(torch.bfloat16))
        peft.apply(model, peft.LoRAConfig(rank=4))
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return loss, sum(size for pointer, size in sizes.items() if pointer not in own)

    (_, three), (_, two) = kept(3), kept(2)
    block = 2 * (2 * 64 + 64 + 2 * 32 + 64 + 2 * 128) + 4 * 4 + 7 * 4 * 4
    assert (three - two) / 64 == block
