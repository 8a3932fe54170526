import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from torch import nn

from llamakern import ops
from llamakern.config import LlamaConfig, RopeScaling
from llamakern.model import CausalAttention, Llama
from llamakern.nn import NF4Linear, quantize_
from llamakern.rotary import interleaved_to_half

# Nothing divides a vector or a tile; two key/value heads of four query heads, and a head_dim that is not dim / n_heads.
ODD = LlamaConfig(
    dim=20, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, hidden_dim=27, vocab_size=37, max_seq_len=64,
    rope_scaling=RopeScaling(factor=4.0, original_max_seq_len=16),
)  # fmt: skip


@pytest.fixture
def model():
    return spread(Llama(ODD))


def spread(model):
    """Weights large enough for attention to choose, and norms that are not 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else p.shape[1] ** -0.5) + (p.dim() == 1))
    return model


def reference_logits(model, tokens, positions=None):
    """The paper's formulas in float64, on whole (T, T) matrices, from the state dict alone."""
    c = model.config
    w = {name: t.double() for name, t in model.state_dict().items()}
    T = tokens.shape[1]
    positions = torch.arange(T) if positions is None else positions
    f = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    if c.rope_scaling is not None:
        f = torch.tensor([scaled(x, c.rope_scaling) for x in f.tolist()], dtype=torch.float64)
    turn = torch.polar(torch.ones(T, len(f)).double(), torch.outer(positions.double(), f))[:, None]  # (T, 1, D/2)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def rotate(x):  # (B, T, H, D)
        half = c.rope_layout == "half"
        pairs = torch.stack(x.chunk(2, -1), -1) if half else x.unflatten(-1, (-1, 2))
        out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return torch.cat(out.unbind(-1), -1) if half else out.flatten(-2)

    x = w["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        at = f"layers.{i}."
        h = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, c.head_dim)) for n in ("q", "k", "v"))
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 2) for t in (k, v))
        s = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(c.head_dim)
        s = s.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
        y = torch.einsum("bhts,bshd->bthd", s.softmax(-1), v).flatten(-2)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = h @ w[at + "mlp.gate_proj.weight"].T, h @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def scaled(f, s):
    wavelength, L = 2 * math.pi / f, s.original_max_seq_len
    if wavelength < L / s.high_freq_factor:
        return f
    if wavelength > L / s.low_freq_factor:
        return f / s.factor
    t = (L / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - t) * f / s.factor + t * f


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


CHANGES = [{}, {"rope_layout": "interleaved"}, {"tie_embeddings": True}, {"n_kv_heads": 4}, {"rope_scaling": None}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "_".join(c) or "odd")
def test_logits_are_the_formulas(change):
    model = spread(Llama(ODD.replace(**change)))
    tokens = torch.randint(0, 37, (3, 11))
    close(model(tokens), reference_logits(model, tokens))


def test_positions_move_the_angles(model):
    tokens, positions = torch.randint(0, 37, (2, 5)), torch.tensor([3, 4, 10, 11, 40])
    close(model(tokens, positions=positions), reference_logits(model, tokens, positions))
    assert_same_bits(model(tokens, positions=positions), model(tokens, positions=positions.expand(2, 5)))


def test_the_two_layouts_are_one_model_with_rows_reordered(model):
    other = Llama(ODD.replace(rope_layout="interleaved"))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for of, to in zip(other.layers, model.layers, strict=True):
            to.self_attn.q_proj.weight.copy_(interleaved_to_half(of.self_attn.q_proj.weight, 4))
            to.self_attn.k_proj.weight.copy_(interleaved_to_half(of.self_attn.k_proj.weight, 2))
    tokens = torch.randint(0, 37, (2, 9))
    close(model(tokens), other(tokens))


@pytest.mark.parametrize("chunks", [(11,), (10, 1), (1,) * 11, (3, 5, 3)], ids=str)
def test_cached_equals_full(model, chunks):
    tokens = torch.randint(0, 37, (2, 11))
    cache = model.new_cache(2, 12)
    parts = [model(part, cache=cache) for part in tokens.split(chunks, 1)]
    close(torch.cat(parts, 1), model(tokens))
    assert not any(part.requires_grad for part in parts)
    assert cache.lengths.tolist() == [11, 11]


def test_rows_of_different_lengths_in_one_cache(model):
    """Padding on the right changes nothing, and the next tokens take its place."""
    prompts, rest = [torch.randint(0, 37, (n,)) for n in (5, 2, 7)], torch.randint(0, 37, (3, 4))
    lengths = torch.tensor([5, 2, 7])
    padded = torch.randint(0, 37, (3, 7))
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = model.new_cache(3, 11)
    first = model(padded, cache=cache, lengths=lengths)
    assert cache.lengths.tolist() == [5, 2, 7]
    then = torch.cat([model(rest[:, :1], cache=cache), model(rest[:, 1:], cache=cache)], 1)
    for b, prompt in enumerate(prompts):
        alone = model(torch.cat((prompt, rest[b]))[None])[0]
        close(first[b, : len(prompt)], alone[: len(prompt)])
        close(then[b], alone[len(prompt) :])


def test_packed_equals_each_alone(model):
    sequences = [torch.randint(0, 37, (1, n)) for n in (4, 1, 9)]
    cu_seqlens = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    packed = torch.cat(sequences, 1)
    alone = torch.cat([model(s) for s in sequences], 1)
    close(model(packed, cu_seqlens=cu_seqlens), alone)
    labels = torch.randint(0, 37, (1, 14))
    want = F.cross_entropy(alone[0], labels[0])
    close(model.loss(packed, labels, cu_seqlens=cu_seqlens), want)


def test_a_mask_hides_keys(model):
    tokens = torch.randint(0, 37, (2, 6))
    assert_same_bits(model(tokens, mask=torch.ones(6, 6, dtype=torch.bool)), model(tokens))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, :2] = False  # row 1 is padded on the left
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    y = model(tokens, mask=mask, positions=positions)
    close(y[1, 2:], model(tokens[1:, 2:])[0])


def test_loss_is_cross_entropy_of_the_logits(model):
    tokens, labels = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (2, 9))
    labels[0, :5] = -100
    z = model(tokens).transpose(1, 2)
    for reduction in ("mean", "sum"):
        close(model.loss(tokens, labels, reduction=reduction), F.cross_entropy(z, labels, reduction=reduction))
    close(model.loss(tokens, labels, reduction="none"), F.cross_entropy(z, labels, reduction="none"))


def test_loss_through_a_head_that_is_not_plain(model):
    tokens, labels = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (2, 9))
    want = model.loss(tokens, labels)
    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    close(model.loss(tokens, labels), want)
    assert model.loss(tokens, labels, reduction="none").shape == (2, 9)


def test_every_parameter_gets_the_gradient_of_the_formulas(model):
    tokens, labels = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (2, 9))
    model.loss(tokens, labels).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        direction, eps = torch.randn_like(p), 1e-5 / p.norm()
        losses = []
        for sign in (1, -1):
            state = {n: t.double() for n, t in before.items()} | {name: before[name].double() + sign * eps * direction}
            probe = Llama(ODD).double()
            probe.load_state_dict(state)
            losses.append(F.cross_entropy(reference_logits(probe, tokens).transpose(1, 2), labels))
        slope = (losses[0] - losses[1]) / (2 * eps)
        torch.testing.assert_close((p.grad.double() * direction).sum(), slope.double(), rtol=1e-3, atol=1e-5, msg=name)


def test_checkpointing_changes_no_bit(model, dtype):
    model.to(dtype)
    tokens, labels = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (2, 9))
    grads = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        loss = model.loss(tokens, labels)
        loss.backward()
        grads.append([loss.detach()[None], *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


def test_attend_socket(model):
    """Whatever stands there sees the rotated and the plain q and k, the layer's input, and which layer it is."""
    seen = []

    class Spy(CausalAttention):
        def forward(self, q, k, v, x, ctx):
            turned = ops.rope(ctx.q_raw, ctx.k_raw, ctx.cos, ctx.sin)
            assert_same_bits(turned[0], q)
            assert_same_bits(turned[1], k)
            seen.append((ctx.layer, tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(x.shape)))
            return super().forward(q, k, v, x, ctx)

    tokens = torch.randint(0, 37, (2, 5))
    want = model(tokens)
    for layer in model.layers:
        layer.self_attn.attend = Spy()
    assert_same_bits(model(tokens), want)
    assert seen == [(i, (2, 5, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6), (2, 5, 20)) for i in range(3)]


def test_linear_socket(model):
    class Twice(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x):
            return 2 * self.base(x)

    tokens = torch.randint(0, 37, (2, 5))
    half = spread(Llama(ODD))
    half.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.mlp.down_proj = Twice(layer.mlp.down_proj)
    with torch.no_grad():
        for layer in half.layers:
            layer.mlp.down_proj.weight.mul_(2)
    close(model(tokens), half(tokens))


def test_tied_embeddings_are_one_parameter():
    model = Llama(ODD.replace(tie_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_bfloat16(model):
    tokens = torch.randint(0, 37, (2, 9))
    truth = reference_logits(model.to(torch.bfloat16), tokens)
    y = model(tokens)
    assert y.dtype == torch.bfloat16
    assert (y.double() - truth).abs().mean() < 0.02 * truth.abs().mean()
    cache = model.new_cache(2, 9)
    assert cache.k[0].dtype == torch.bfloat16
    parts = torch.cat([model(tokens[:, :4], cache=cache), model(tokens[:, 4:], cache=cache)], 1)
    assert (parts.double() - truth).abs().mean() < 0.02 * truth.abs().mean()


def test_autocast(model):
    """Linears and attention run in bfloat16; the residual stream, the norms and the loss stay in float32."""
    tokens, labels = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (2, 9))
    want, loss_want = model(tokens), model.loss(tokens, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, loss = model(tokens), model.loss(tokens, labels)
        cache = model.new_cache(2, 9)
        parts = torch.cat([model(tokens[:, :4], cache=cache), model(tokens[:, 4:], cache=cache)], 1)
    assert y.dtype == parts.dtype == cache.k[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert (loss - loss_want).abs() < 0.02 * loss_want
    for t in (y, parts):
        assert (t - want).abs().mean() < 0.02 * want.abs().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_quantised_model_stays_near(model):
    tokens = torch.randint(0, 37, (2, 9))
    want = model(tokens)
    quantize_(model)
    assert type(model.lm_head) is nn.Linear
    assert all(isinstance(p, NF4Linear) for p in (model.layers[0].self_attn.q_proj, model.layers[2].mlp.down_proj))
    dense = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    y = model(tokens)
    assert (y - want).abs().mean() < 0.5 * want.abs().mean()
    plain = Llama(ODD)
    state = {n: t for n, t in model.state_dict().items() if n in plain.state_dict()}
    plain.load_state_dict(state | {f"{n}.weight": w for n, w in dense.items()})
    close(y, plain(tokens))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(5, dtype=torch.int64)), r"model: tokens must have shape \(B, T\), got \[5\]"),
        (
            lambda m: m(torch.zeros(1, 2, dtype=torch.int64), cache=m.new_cache(3, 9)),
            "model: cache must have batch 1, got 3",
        ),
        (
            lambda m: m(torch.zeros(1, 5, dtype=torch.int64), cache=m.new_cache(1, 4)),
            "cache: max_len must be at least 5, got 4",
        ),
        (
            lambda m: m(torch.zeros(1, 2, dtype=torch.int64), cache=m.new_cache(1, 4), mask=torch.ones(2, 2) > 0),
            "model: cu_seqlens and mask must be None with a cache",
        ),
        (
            lambda m: m(torch.zeros(1, 2, dtype=torch.int64), positions=torch.zeros(3, dtype=torch.int64)),
            r"model: positions must have shape \(2,\) or \(1, 2\), got \[3\]",
        ),
        (
            lambda m: m(torch.zeros(2, 2, dtype=torch.int64), cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)),
            "model: tokens must have one row with cu_seqlens, got 2",
        ),
    ],
)
def test_bad_calls(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_full_cache_is_left_as_it_was(model):
    cache = model.new_cache(1, 4)
    model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="cache: max_len must be at least 5, got 4"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    assert (cache.lengths.tolist(), cache.used) == ([3], 3)


def test_stories260k_logits(data_dir):
    want = np.load(data_dir / "vectors" / "stories260K_hf.npz")
    model = Llama.from_pretrained(data_dir / "stories260K")
    ids, story = (torch.from_numpy(want[k])[None] for k in ("greedy_ids", "story0_ids"))
    with torch.inference_mode():
        close(model(ids)[0], torch.from_numpy(want["greedy_logits"]), 1e-4)
        close(model(story)[0, -1], torch.from_numpy(want["story0_logits_last"]), 1e-4)
        close(model.loss(story[:, :-1], story[:, 1:]), torch.from_numpy(want["story0_loss"]), 1e-4)


def test_tinystories_656k_logits_equal_transformers(data_dir):
    transformers = pytest.importorskip("transformers")
    folder = data_dir / "tinystories-656k"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = Llama.from_pretrained(folder)
    tokens = torch.randint(0, 2048, (2, 64))
    with torch.inference_mode():
        close(ours(tokens), theirs(tokens).logits, 1e-4)


@pytest.mark.parametrize(
    ("tokens", "lengths"), [([[1, 2], [3, 10_000]], None), ([[1, 2], [3, 4]], [1, 2, 2])], ids=["id", "lengths"]
)
def test_a_failing_call_leaves_the_cache_as_it_was(model, tokens, lengths):
    tokens, lengths = torch.tensor(tokens), None if lengths is None else torch.tensor(lengths)
    cache, good = model.new_cache(2, 9), torch.tensor([[5, 6, 7], [7, 6, 5]])
    model(good, cache=cache, lengths=torch.tensor([3, 1]))
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens, cache=cache, lengths=lengths)
    assert (cache.lengths.tolist(), cache.used) == ([3, 1], 3)
    other = model.new_cache(2, 9)
    model(good, cache=other, lengths=torch.tensor([3, 1]))
    assert torch.equal(model(good, cache=cache), model(good, cache=other))
