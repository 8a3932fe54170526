"""LLaMA-Excitor: counts, dead settings, starts at the base, a cache of its keys, training, features."""

import math

import pytest
import torch
from compare import assert_same_bits
from torch import nn

from llamakern import Llama, LlamaConfig, check_training, generate, peft
from llamakern.model import CausalAttention
from llamakern.nn import quantize_
from llamakern.peft import ExcitorConfig, LoRAConfig

TINY = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=53, max_seq_len=64)
X = torch.arange(22).reshape(2, 11)
SWITCHES = {
    "default": {},
    "both": {"extra_rope": "both"},
    "none": {"extra_rope": "none"},
    "heads_of_q": {"extra_key_heads": "q", "gate_scope": "head"},
    "heads_of_q_none": {"extra_key_heads": "q", "extra_rope": "none"},
    "literal": {"score_scale": "width", "prompt_attention": "full_width", "gate_activation": "tanh"},
    "full_width_both": {"prompt_attention": "full_width", "extra_rope": "both", "low_rank_scale": 2.0},
    "zero_b": {"low_rank_init": "zero_b"},
    "zero_gate": {"gate_init": "zeros"},
}


def base(packed=False, **change):
    torch.manual_seed(1)
    model = Llama(TINY.replace(**change)).eval()
    for layer in model.layers:  # queries and keys that the attention is not indifferent to
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.data.mul_(12)
    return quantize_(model) if packed else model


def excited(model=None, **values):
    """A model with Excitor in it that is away from its start."""
    torch.manual_seed(2)
    model = peft.apply(model or base(), ExcitorConfig(**{"prompt_len": 6, "rank": 4, "gate_init": "0.8"} | values))
    for name, p in peft.trainable(model).items():
        if name.endswith("lora_b"):
            p.data.normal_()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What it is made of


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        llama = Llama(LlamaConfig.preset("llama-7b"))
        one = peft.count_trainable(peft.apply(llama, ExcitorConfig()))
        peft.remove(llama, "default")
        many = peft.count_trainable(peft.apply(llama, ExcitorConfig(gate_scope="head")))
        peft.remove(llama, "default")
        seeing = peft.apply(llama, ExcitorConfig(visual_dim=768, n_layers=2))
        names = [n for n in peft.trainable(seeing) if "layers.30." in n]
    assert one == 7_618_560 + 30
    assert many == 7_618_560 + 30 * 32
    assert peft.count_trainable(seeing) == 2 * (253_952 + 1 + 2 * 16 * (768 + 4096))
    assert len(names) == 8
    assert not any("layers.29." in n for n in peft.trainable(seeing))


@pytest.mark.parametrize(("n_layers", "want"), [(None, [2]), (1, [2]), (3, [0, 1, 2])])
def test_layers_count_from_the_top(n_layers, want):
    model = excited(n_layers=n_layers)
    found = [i for i, layer in enumerate(model.layers) if type(layer.self_attn.attend) is not CausalAttention]
    assert found == want
    assert all(p.dtype == torch.float32 for p in peft.trainable(model).values())


def test_starts_are_what_the_settings_say():
    attend = excited(prompt_len=200, rank=64, gate_init="normal", gate_scope="head").layers[2].self_attn.attend
    attend.reset_parameters()
    for p, bound in ((attend.lora_a, 1 / 8), (attend.lora_b, 1 / 8)):
        assert 0.98 * bound < p.abs().max() <= bound
    assert 0.97 < attend.prompts.std() < 1.03
    assert 0 < attend.gate.abs().max() < 0.05
    assert torch.equal(excited(gate_init="0.25").layers[2].self_attn.attend.gate, torch.tensor([0.25]))
    assert not excited(low_rank_init="zero_b").layers[2].self_attn.attend.reset_parameters()


DEAD = [
    ({"prompt_init_std": 0.0}, "prompt_init_std must not be 0: prompts that are equal give every token the same"),
    ({"prompt_init_std": 0.0, "extra_rope": "both"}, "prompt_init_std must not be 0"),
    ({"prompt_len": 1}, "prompt_len must be at least 2: a softmax over one prompt is 1 for every token"),
    ({"low_rank_init": "zeros"}, "low_rank_init must not be zeros: with A = B = 0 E = 0 weighs all prompts alike"),
    ({"low_rank_scale": 0.0}, "low_rank_scale must not be 0: with A = B = 0"),
    ({"low_rank_init": "zero_b", "gate_init": "zeros"}, "gate_init must not be zeros with low_rank_init zero_b: with"),
    ({"low_rank_init": "zero_b", "gate_init_std": 0.0}, "gate_init must not be zeros with low_rank_init zero_b"),
    ({"low_rank_init": "zero_b", "gate_init": "0", "extra_rope": "none"}, "gate_init must not be zeros with low_rank"),
    ({"prompt_len": 0}, "prompt_len must be a positive integer, got 0"),
    ({"n_layers": -1}, "n_layers must be a positive integer, got -1"),
    ({"extra_rope": "k"}, r"extra_rope must be one of \['q_only', 'both', 'none'\], got 'k'"),
    ({"gate_init": "zero"}, "gate_init must be normal, zeros or a number, got 'zero'"),
    ({"gate_init_std": float("nan")}, "gate_init_std must be a finite number, got nan"),
]


@pytest.mark.parametrize(("values", "message"), DEAD, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_settings_that_cannot_train_are_refused_with_the_reason(values, message):
    with pytest.raises(ValueError, match=f"excitor: {message}"):
        ExcitorConfig(**values)


def test_what_does_not_fit_the_model():
    with pytest.raises(ValueError, match="excitor: n_layers must be at most the model's 3, got 4"):
        excited(n_layers=4)
    with pytest.raises(ValueError, match='excitor: head_dim must be at most 128 with extra_rope="none", got 132'):
        excited(base(head_dim=132), extra_rope="none")
    with pytest.raises(ValueError, match=r"excitor: features must have shape \(B, Nv, 8\), got \[2, 3, 9\]"):
        excited(visual_dim=8)(X, features=torch.zeros(2, 3, 9))


def test_the_refused_starts_are_dead():
    """What the messages say: from those starts some tensor's gradient is zero, but for rounding."""

    def largest(prepare, extra_rope="q_only"):
        model = excited(extra_rope=extra_rope, gate_init="0.8", low_rank_init="kaiming")
        attend = model.layers[2].self_attn.attend
        with torch.no_grad():
            prepare(attend)
        model.loss(X, X.roll(-1, 1)).backward()
        return {name: p.grad.abs().max().item() for name, p in attend.named_parameters() if p.grad is not None}

    alive = largest(lambda attend: None)
    assert min(alive.values()) > 1e-6
    starts = {
        "zero prompts": (lambda a: a.prompts.zero_(), ("lora_a", "lora_b", "prompts", "gate")),
        "zero a and b": (lambda a: (a.lora_a.zero_(), a.lora_b.zero_()), ("lora_a", "lora_b", "prompts", "gate")),
        "zero b and gate": (lambda a: (a.lora_b.zero_(), a.gate.zero_()), ("lora_a", "lora_b", "prompts", "gate")),
    }
    for prepare, dead in starts.values():
        found = largest(prepare)
        assert all(found[name] <= 1e-5 * max(alive.values()) for name in dead), found
    assert largest(starts["zero prompts"][0], "both")["lora_a"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("switch", ["default", "both", "heads_of_q", "full_width_both"])
def test_a_zero_gate_is_the_base_bit_for_bit(switch, packed, dtype):
    want = base(packed).to(dtype)(X)
    for extra in ([], [LoRAConfig(rank=2)]):
        model = peft.apply(base(packed).to(dtype), [ExcitorConfig(**SWITCHES[switch] | {"gate_init": "zeros"}), *extra])
        assert_same_bits(model(X), want)


def test_zero_b_is_the_base_but_for_rounding():
    """The extra key is then the same for all tokens, and the softmax cancels it, whatever the gate."""
    want = base()(X)
    for extra_rope, change in (("q_only", 0), ("none", 0), ("both", 1)):
        model = peft.apply(base(), ExcitorConfig(low_rank_init="zero_b", gate_init="3.0", extra_rope=extra_rope))
        difference = (model(X) - want).abs().max()
        assert (difference > 1e-3) if change else (difference < 1e-4)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_cached_decode_equals_the_full_forward(switch, packed):
    model = excited(base(packed), **{"n_layers": 3} | SWITCHES[switch])
    model.layers[2].self_attn.attend.gate.data.fill_(0.8)
    full = model(X)
    cache = model.new_cache(2, 11)
    with torch.no_grad():
        steps = [model(X[:, :4], cache=cache), *(model(X[:, t : t + 1], cache=cache) for t in range(4, 11))]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
    heads, width = (4 if "heads_of_q" in switch else 2), (32 if "none" in switch else 16)
    assert cache.k[2].shape == cache.v[2].shape == (2, 11, heads, width)
    want = X[:, :4]
    for _ in range(4):
        want = torch.cat((want, model(want)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, X[:, :4], max_new_tokens=4), want)


def test_the_cache_holds_the_new_keys():
    model = excited(n_layers=1)
    cache, plain = model.new_cache(2, 11), base().new_cache(2, 11)
    with torch.no_grad():
        model(X, cache=cache)
        base()(X, cache=plain)
    assert_same_bits(cache.k[1], plain.k[1])
    assert not torch.equal(cache.k[2], plain.k[2])
    assert_same_bits(cache.v[2], plain.v[2])


def test_packed_sequences_are_each_alone():
    model = excited(n_layers=3)
    packed = model(X.reshape(1, 22), cu_seqlens=torch.tensor([0, 11, 22], dtype=torch.int32))
    torch.testing.assert_close(packed.view(2, 11, -1), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("switch", ["default", "both", "none", "heads_of_q"])
def test_rope_layouts_are_a_permutation_of_each_other(switch, tmp_path):
    """The same model with pairs (2i, 2i + 1): its files hold prompts and B in one order, and give the same logits."""
    from llamakern.rotary import half_to_interleaved

    half, other = base(), base(rope_layout="interleaved")
    for layer in other.layers:
        for name, heads in (("q_proj", 4), ("k_proj", 2)):
            linear = getattr(layer.self_attn, name)
            linear.weight = nn.Parameter(half_to_interleaved(linear.weight.detach(), heads))
    excited(half, visual_dim=5, **SWITCHES[switch])
    features = torch.randn(2, 3, 5)
    peft.save(half, tmp_path / "half")
    peft.load(other, tmp_path / "half")
    torch.testing.assert_close(other(X, features=features), half(X, features=features), rtol=1e-4, atol=1e-4)
    assert not torch.equal(other.layers[2].self_attn.attend.prompts, half.layers[2].self_attn.attend.prompts)
    peft.save(other, tmp_path / "other")
    again = peft.load(base(), tmp_path / "other")
    assert_same_bits(again(X, features=features), half(X, features=features))


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_tensor_trains(switch):
    model = peft.apply(base().train(), ExcitorConfig(prompt_len=6, rank=4, n_layers=2, **SWITCHES[switch]))
    optimizer = torch.optim.AdamW(peft.trainable(model).values(), lr=1e-3)
    gate = check_training(model, optimizer)
    for _ in range(5):
        model.loss(X, X.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gate.judged


def test_nothing_below_the_lowest_layer_records_a_gradient():
    model = excited(n_layers=1)
    seen = []
    for layer in model.layers:
        layer.input_layernorm.register_forward_hook(lambda _m, _x, y: seen.append(y[0] if isinstance(y, tuple) else y))
    model.loss(X, X.roll(-1, 1))
    assert [y.requires_grad for y in seen] == [False] * 3
    seen.clear()
    excited(model=peft.remove(model, "default"), n_layers=2).loss(X, X.roll(-1, 1))
    assert [y.requires_grad for y in seen] == [False, False, True]


@pytest.mark.parametrize("switch", ["default", "none"])
def test_checkpointed_activations_give_the_same_gradients(switch, dtype):
    def gradients(checkpoint):
        model = excited(base().to(dtype), n_layers=3, **SWITCHES[switch]).train()
        model.checkpoint_activations = checkpoint
        model.loss(X, X.roll(-1, 1)).backward()
        return {n: p.grad for n, p in peft.trainable(model).items()}

    for (name, a), b in zip(gradients(False).items(), gradients(True).values(), strict=True):
        assert_same_bits(a, b, name)


def copying(step, B, features=True):
    """Four different letters, a question mark, then one of the letters; which one, only the features say."""
    generator = torch.Generator().manual_seed(step)
    letters = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(B)])
    answer = letters[torch.arange(B), torch.randint(4, (B,), generator=generator)]
    tokens = torch.cat((letters, torch.full((B, 1), 12)), 1)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = answer
    shown = nn.functional.one_hot(answer, 12).float()[:, None] + 0.1 * torch.randn(B, 2, 12, generator=generator)
    return tokens, labels, shown


def trained(model, steps, lr, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        tokens, labels, features = batch(step)
        model.loss(tokens, labels, features=features).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def copier():
    """A base that has learned to answer with any of the four letters."""
    torch.manual_seed(0)
    model = Llama(TINY.replace(vocab_size=13, n_layers=2))
    return trained(model, 200, 3e-3, lambda step: (*copying(step, 32)[:2], None)).requires_grad_(False)


def held_out(model, features):
    tokens, labels, shown = copying(10**6, 256)
    with torch.no_grad():
        return model.loss(tokens, labels, features=shown if features else None).item()


def test_features_are_used_to_answer(copier):
    before = held_out(copier, features=False)
    chance = math.log(4)
    assert chance < before < 2.1
    model = peft.apply(copier, ExcitorConfig(n_layers=2, visual_dim=12))
    trained(model, 200, 1e-2, lambda step: copying(step, 32))
    assert held_out(model, features=True) < 0.7
    assert held_out(model, features=False) > chance
    tokens, labels, shown = copying(10**6, 64)
    answers = generate(model, tokens, max_new_tokens=1, features=shown)[:, -1]
    assert (answers == labels[:, -1]).float().mean() > 0.8
    peft.remove(model, "default")
    assert held_out(copier, features=False) == before


def test_held_out_loss_falls(copier):
    """The letter that comes first in the alphabet is the answer: the attention has to learn where to look."""

    def first_letter(step, B):
        tokens, labels, _ = copying(step, B)
        labels[:, -1] = tokens[:, :4].min(1).values
        return tokens, labels, None

    def loss(model):
        with torch.no_grad():
            return model.loss(*first_letter(10**6, 256)[:2]).item()

    before = loss(copier)
    for beside in ([], [LoRAConfig(rank=2, targets=("q_proj", "v_proj"))]):
        model = peft.apply(copier, [ExcitorConfig(n_layers=2), *beside])
        trained(model, 100, 1e-2, lambda step: first_letter(step, 32))
        after = loss(model)
        peft.remove(model, "default")
        assert loss(copier) == before
        assert after < before - 0.3
