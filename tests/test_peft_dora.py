"""LoRALinear in full: DoRA against float64, biases, dtypes, and what a training step keeps in memory."""

import pytest
import torch
from compare import assert_same_bits, check_against_reference
from torch import nn
from torch.func import functional_call

from llamakern import Llama, LlamaConfig, peft
from llamakern.nn import LoRALinear, NF4Linear, quantize_
from llamakern.peft import LoRAConfig

SCALE, RANK = 0.75, 4
BASES = ["dense", "nf4", "nf4-double", "nf4-flat"]


def linear(base, dtype=torch.float32, bias=True):
    """(N, K) = (260, 128): more rows than one block of them; or (12, 44), whose NF4 blocks cross rows."""
    N, K = (12, 44) if base == "nf4-flat" else (260, 128)
    dense = nn.Linear(K, N, bias=bias).to(dtype)
    return dense if base == "dense" else NF4Linear.from_linear(dense, double_quant=base == "nf4-double")


def dora(base, dtype=torch.float32, dropout=0.0, bias=True):
    made = LoRALinear(linear(base, dtype, bias), RANK, SCALE, dropout, dora=True)
    with torch.no_grad():
        made.lora_b.normal_(std=0.3)
        made.magnitude.mul_(torch.rand_like(made.magnitude) + 0.5)
    return made


def dense(module):
    return module.base.dequantize(torch.float32) if isinstance(module.base, NF4Linear) else module.base.weight.detach()


def formula(w, bias, mask=None):
    """DoRA in plain PyTorch; with a mask (M, K) in PEFT's form for dropout."""

    def run(x, a, b, m):
        W, t = w.to(x.dtype), x.dtype
        a, b, m = a.to(t), b.to(t), m.to(t)
        c = m / (W + SCALE * b @ a).detach().norm(dim=1)
        bias_ = 0 if bias is None else bias.detach().to(t)
        if mask is None:
            return c * (x @ W.T + SCALE * (x @ a.T) @ b.T) + bias_
        x_ = x * mask.to(t)
        return x @ W.T + bias_ + (c - 1) * (x_ @ W.T) + c * SCALE * ((x_ @ a.T) @ b.T)

    return run


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["whole", "dropped"])
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_against_float64(base, dropout, bias, dtype):
    module = dora(base, dtype, dropout, bias).train()
    x = torch.randn(3, 5, module.in_features, dtype=dtype, requires_grad=True)
    torch.manual_seed(7)
    mask = nn.functional.dropout(torch.ones_like(x), dropout) if dropout else None

    def ours(x, a, b, m):
        torch.manual_seed(7)
        return functional_call(module, {"lora_a": a, "lora_b": b, "magnitude": m}, x)

    inputs = [x, module.lora_a, module.lora_b, module.magnitude]
    check_against_reference(ours, formula(dense(module), module.base.bias, mask), inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["whole", "dropped"])
@pytest.mark.parametrize("base", BASES)
def test_it_starts_at_the_base_bit_for_bit(base, dropout, dtype):
    base = linear(base, dtype, bias=False)
    module = LoRALinear(base, RANK, SCALE, dropout, dora=True).train()
    x = torch.randn(6, module.in_features, dtype=dtype)
    if dtype == torch.float16 and type(base) is nn.Linear:  # ours is float32's there, rounded once
        torch.testing.assert_close(module(x), base(x), rtol=1e-3, atol=1e-5)
    else:
        assert_same_bits(module(x), base(x))
    if dtype == torch.float32:
        torch.testing.assert_close(module.magnitude.detach(), dense(module).norm(dim=1))


@pytest.mark.parametrize("base", BASES)
def test_row_norms_against_their_definition(base, dtype):
    module = dora(base, dtype)
    w = dense(module).double()
    for shrink in (0.0, 0.9):  # with 0.9 the rows of W + s·B A are a tenth of W's, so that the terms cancel
        with torch.no_grad():
            if shrink:
                u, s, v = torch.linalg.svd(-shrink / SCALE * w, full_matrices=False)
                module.lora_a = nn.Parameter(v.float())
                module.lora_b = nn.Parameter((u * s).float())
            want = (w + SCALE * module.lora_b.double() @ module.lora_a.double()).norm(dim=1)
        torch.testing.assert_close(module.row_norms().double(), want, rtol=1e-4 if shrink else 1e-6, atol=0)


def test_row_norms_follow_the_base():
    """What is kept of the frozen weight is made anew when that weight is cast, loaded or replaced."""
    module = dora("dense")
    other = nn.Linear(128, 260)

    def want():
        return (dense(module).float() + SCALE * module.lora_b.detach().float() @ module.lora_a.detach().float()).norm(
            dim=1
        )

    for change in (
        lambda: module.load_state_dict({"base.weight": other.weight, "base.bias": other.bias}, strict=False),
        lambda: module.to(torch.bfloat16),
        lambda: setattr(module, "base", NF4Linear.from_linear(other)),
    ):
        before = module.row_norms()
        change()
        torch.testing.assert_close(module.row_norms(), want())
        assert not torch.equal(module.row_norms(), before)


def test_generation_computes_the_norms_once(monkeypatch):
    module, x, calls = dora("nf4").eval(), torch.randn(2, 128), []
    row_norms = LoRALinear.row_norms
    monkeypatch.setattr(LoRALinear, "row_norms", lambda self: calls.append(1) or row_norms(self))

    def fresh():
        with torch.enable_grad():
            return module(x).detach()

    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: module.lora_a.data.mul_(2),  # which no version counter sees
            lambda: module.lora_b.add_(1),
            lambda: module.magnitude.add_(1),
            lambda: module.load_state_dict({"base.absmax": module.base.absmax * 2}, strict=False),
            lambda: setattr(module, "base", NF4Linear.from_linear(nn.Linear(128, 260))),
        ):
            module(x)
            change()
            assert_same_bits(module(x), fresh())
        calls.clear()
        for _ in range(3):
            module(x)
        assert not calls
    module(x)
    assert len(calls) == 1


def test_norms_are_a_constant_of_the_backward():
    """Were n differentiated too, a scaled B would leave the direction of W + s·B A and so the loss as it is."""
    module = dora("dense", bias=False)
    x = torch.randn(5, 128)
    module(x).square().sum().backward()
    y = module(x).detach()
    n = module.row_norms()
    dm = (2 * y * y / module.magnitude.detach()).sum(0)
    torch.testing.assert_close(module.magnitude.grad, dm)
    dv = (2 * y * module.magnitude.detach() / n).T @ x
    torch.testing.assert_close(module.lora_b.grad, SCALE * dv @ module.lora_a.detach().T, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_gives_zeros_and_finite_gradients():
    base = nn.Linear(64, 3, bias=False)
    base.weight.data[1] = 0
    module = LoRALinear(base, 2, 1.0, dora=True)
    y = module(torch.randn(4, 64))
    y.square().sum().backward()
    assert not y[:, 1].any()
    assert all(torch.isfinite(p.grad).all() for p in (module.lora_a, module.lora_b, module.magnitude))


@pytest.mark.parametrize(("base", "dropout"), [("dense", 0.4), ("nf4", 0.0)])
def test_a_compiled_model(base, dropout):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=64, vocab_size=23))
    peft.apply(
        model if base == "dense" else quantize_(model, block_size=32),
        LoRAConfig(rank=2, dora=True, dropout=dropout, targets=("q_proj", "up_proj")),
    )
    for parameter in peft.trainable(model).values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.arange(10).reshape(2, 5)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(7)
        y = run(tokens)
        grads = torch.autograd.grad(y.square().sum(), list(peft.trainable(model).values()))
        results.append([y.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["dense", "nf4-double"])
def test_compiles_without_a_break(base):
    module, x = dora(base), torch.randn(6, 128)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_under_autocast():
    module = dora("dense")
    x = torch.randn(6, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", BASES)
def test_terms_beyond_float16_leave_a_finite_sum(base, autocast):
    """x fits, dropout doubles it and x̃ Wᵀ does not fit; at the start c - 1 is 0 and y is x Wᵀ."""
    eye = nn.Linear(64, 64, dtype=torch.float32 if autocast else torch.float16)
    eye.weight.data.copy_(torch.eye(64))
    eye.bias.data.zero_()
    base = eye if base == "dense" else NF4Linear.from_linear(eye, double_quant=base == "nf4-double")
    module = LoRALinear(base, RANK, SCALE, dropout=0.5, dora=True).train()
    x = (40000 * torch.eye(64, dtype=torch.float32 if autocast else torch.float16)).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = module(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), 40000 * torch.eye(64), rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert torch.isfinite(module.lora_b.grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# Biases and dtypes


@pytest.mark.parametrize("base", BASES)
def test_a_bias_on_b(base, dtype):
    """s·lora_bias is added, and every bias has its gradient."""
    module = LoRALinear(linear(base, dtype), RANK, SCALE, bias=True)
    assert not module.lora_bias.any()
    with torch.no_grad():
        module.lora_b.normal_(std=0.3)
        module.lora_bias.normal_()
    module.base.bias.requires_grad_(True)
    w = dense(module)
    x = torch.randn(3, 5, module.in_features, dtype=dtype, requires_grad=True)

    def ours(x, a, b, lora_bias, bias):
        return functional_call(module, {"lora_a": a, "lora_b": b, "lora_bias": lora_bias, "base.bias": bias}, x)

    def plain(x, a, b, lora_bias, bias):
        a, b, lora_bias, bias = (t.to(x.dtype) for t in (a, b, lora_bias, bias))
        return x @ w.to(x.dtype).T + SCALE * ((x @ a.T) @ b.T + lora_bias) + bias

    check_against_reference(ours, plain, [x, module.lora_a, module.lora_b, module.lora_bias, module.base.bias])


def test_a_fresh_bias_on_b_is_the_base():
    for base in (linear("dense"), linear("nf4", bias=False)):
        x = torch.randn(6, 128)
        assert torch.equal(LoRALinear(base, RANK, SCALE, bias=True)(x), base(x))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=["a32", "ab16", "a16"])
@pytest.mark.parametrize("base", BASES)
def test_adapters_of_either_dtype_beside_each_base(base, adapter, dtype):
    module = LoRALinear(linear(base, dtype), RANK, SCALE)
    module.lora_a.data = module.lora_a.data.to(adapter)
    module.lora_b.data = torch.randn_like(module.lora_b).to(adapter)
    if adapter not in (torch.float32, dtype):  # a half-precision adapter goes with tokens of its dtype
        with pytest.raises(TypeError, match=r"lora_linear: lora_a must be .* like x.*, got b?float16"):
            module(torch.randn(2, module.in_features, dtype=dtype))
        return
    w, bias = dense(module), module.base.bias.detach()
    x = torch.randn(3, 5, module.in_features, dtype=dtype, requires_grad=True)

    def plain(x, a, b):
        return x @ w.to(x.dtype).T + SCALE * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T + bias.to(x.dtype)

    def ours(x, a, b):
        return functional_call(module, {"lora_a": a, "lora_b": b}, x)

    check_against_reference(ours, plain, [x, module.lora_a, module.lora_b])


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def kept(module, x):
    """Bytes that a forward pass saves for its backward, without parameters, buffers and x itself."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), x)}
    sizes = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(sizes.values())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lora_keeps_one_small_tensor(base, dropout, dtype):
    M = 64
    module = LoRALinear(linear(base, dtype, bias=False), RANK, SCALE, dropout).train()
    x = torch.randn(M, 128, dtype=dtype, requires_grad=True)
    assert kept(module, x) == M * RANK * 4 + (8 if dropout else 0)  # h in float32, and the seed


def test_dora_keeps_y_too():
    M = 64
    module = dora("nf4", torch.bfloat16, bias=False)
    N = module.out_features
    x = torch.randn(M, 128, dtype=torch.bfloat16, requires_grad=True)
    assert kept(module, x) == M * RANK * 4 + M * N * 2 + 2 * N * 4  # c and n


def test_repr_and_bad_calls():
    assert "rank=4, scale=0.75, dropout=0, dora=True" in repr(dora("dense"))
    assert "dropout=0, bias=True" in repr(LoRALinear(nn.Linear(8, 8), 2, 1.0, bias=True))
    with pytest.raises(ValueError, match="lora: bias must be False with dora, got True"):
        LoRALinear(nn.Linear(8, 8), 2, 1.0, dora=True, bias=True)
