import json

import pytest
import torch
from compare import assert_same_bits
from torch import nn

from llamakern import peft
from llamakern.config import LlamaConfig
from llamakern.decoding import decoder, is_plain
from llamakern.generation import Sampling, generate
from llamakern.model import CausalAttention, Llama
from llamakern.nn import NF4Linear, quantize_
from llamakern.peft import LoRAConfig
from llamakern.tokenizer import load_tokenizer


@pytest.fixture
def model():
    model = Llama(LlamaConfig(dim=20, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, hidden_dim=27, vocab_size=37))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20) if p.dim() > 1 else None
    return model


def full_forward(model, prompt, n):
    """Greedy without a cache."""
    tokens = prompt[None]
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0]


def test_greedy_is_the_argmax_of_the_full_forward(model):
    prompts = torch.randint(0, 37, (3, 5))
    out = generate(model, prompts, max_new_tokens=12)
    assert out.shape == (3, 17)
    assert out.dtype == torch.int64
    for row, prompt in zip(out, prompts, strict=True):
        assert row.tolist() == full_forward(model, prompt, 12).tolist()


def test_rows_of_different_lengths_equal_each_alone(model):
    lengths = torch.tensor([5, 1, 3])
    prompts = torch.randint(0, 37, (3, 5))
    out = generate(model, prompts, max_new_tokens=8, lengths=lengths, pad_id=36)
    for row, prompt, n in zip(out, prompts, lengths.tolist(), strict=True):
        alone = generate(model, prompt[None, :n], max_new_tokens=8)[0]
        assert row.tolist() == alone.tolist() + [36] * (5 - n)


def test_a_row_ends_with_eos_and_the_others_go_on(model):
    prompts = torch.randint(0, 37, (3, 4))
    free = generate(model, prompts, max_new_tokens=10)
    eos = free[0, 6].item()  # row 0 makes it, at its third new token at the latest
    out = generate(model, prompts, max_new_tokens=10, eos_id=(eos, 1000), pad_id=36)
    ends = []
    for row, want in zip(out, free, strict=True):
        new = want[4:].tolist()
        end = new.index(eos) + 1 if eos in new else 10
        assert row[4:].tolist() == (new[:end] + [36] * 10)[: out.shape[1] - 4]
        ends.append(end)
    assert out.shape[1] == 4 + max(ends)
    assert generate(model, prompts[:1], max_new_tokens=10, eos_id=eos).shape[1] == 4 + ends[0]


class Letters:
    """Token i is the letter i."""

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)


def test_stop_strings(model):
    prompts = torch.randint(0, 37, (2, 4))
    free = generate(model, prompts, max_new_tokens=10)
    text = Letters().decode(free[0, 4:].tolist())
    stop = text[2:5]
    out = generate(model, prompts[:1], max_new_tokens=10, stop=("never", stop), tokenizer=Letters())
    assert Letters().decode(out[0, 4:].tolist()) == text[: text.index(stop) + 3]
    assert generate(model, prompts[:1], max_new_tokens=10, stop=stop, tokenizer=Letters()).tolist() == out.tolist()
    prompt_text = Letters().decode(prompts[0].tolist())  # a stop string within the prompt ends nothing
    if prompt_text not in text:
        out = generate(model, prompts[:1], max_new_tokens=10, stop=prompt_text, tokenizer=Letters())
        assert out.tolist() == free[:1].tolist()


def test_streaming(model):
    prompts, seen = torch.randint(0, 37, (2, 4)), []
    free = generate(model, prompts, max_new_tokens=6)
    eos = free[0, 5].item()
    out = generate(model, prompts, max_new_tokens=6, eos_id=eos, on_token=seen.append)
    assert len(seen) == out.shape[1] - 4
    for b in range(2):
        ids = [step[b] for step in seen]
        made = [i for i in ids if i is not None]
        assert ids == made + [None] * (len(ids) - len(made))
        assert made == out[b, 4 : 4 + len(made)].tolist()


def test_seeds(model):
    prompts = torch.randint(0, 37, (2, 4))

    def draw(seed):
        return generate(model, prompts, max_new_tokens=20, temperature=1.5, seed=seed).tolist()

    state = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(state, torch.get_rng_state())


def test_tiny_temperature_and_top_1_are_greedy(model):
    prompts = torch.randint(0, 37, (2, 4))
    want = generate(model, prompts, max_new_tokens=8).tolist()
    assert generate(model, prompts, max_new_tokens=8, temperature=1e-6).tolist() == want
    assert generate(model, prompts, max_new_tokens=8, temperature=2.0, top_k=1).tolist() == want
    assert generate(model, prompts, max_new_tokens=8, temperature=2.0, top_p=1e-9).tolist() == want


def kept(logits, **knobs):
    return [row.isfinite().nonzero().flatten().tolist() for row in Sampling(**knobs).restrict(logits)]


def test_restrict():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()
    whole = [0, 1, 2, 3]
    assert kept(logits) == kept(logits, top_k=9) == kept(logits, top_p=1.0) == kept(logits, min_p=0.0) == [whole, whole]
    assert kept(logits[:1], top_k=2) == [[1, 3]]
    assert kept(logits, top_p=0.65) == [[1, 3], [0]]
    assert kept(logits, top_p=0.75) == [[1, 2, 3], [0]]
    assert kept(logits, min_p=0.4) == [[1, 2, 3], [0]]
    assert kept(logits, min_p=1.0) == [[1], [0]]
    assert kept(logits[:1], top_k=2, top_p=0.5) == [[1]]  # 0.4 of the remaining 0.7 is more than half


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = (p.log() * 2).expand(20000, 4)
    drawn = Sampling(temperature=2.0).pick(logits, None, torch.Generator().manual_seed(0))
    assert (torch.bincount(drawn, minlength=4) / 20000 - p).abs().max() < 0.015


def test_repetition_penalty(model):
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -2.0]])
    seen = torch.tensor([[True, False, False], [True, False, True]])
    assert Sampling(repetition_penalty=1.3).pick(logits, seen).tolist() == [0, 0]
    assert Sampling(repetition_penalty=1.6).pick(logits, seen).tolist() == [1, 1]
    prompts = torch.randint(0, 37, (2, 4))
    out = generate(model, prompts, max_new_tokens=20, repetition_penalty=1e9)
    for row in out.tolist():
        assert len(set(row[4:])) == 20
        assert not set(row[:4]) & set(row[4:])


def test_dropout_is_off_and_modes_come_back(model):
    class Noisy(nn.Module):
        def forward(self, x):
            assert not self.training
            return x

    model.train()
    model.layers[1].eval()
    model.layers[0].mlp.down_proj = nn.Sequential(model.layers[0].mlp.down_proj, Noisy())
    modes = [m.training for m in model.modules()]
    generate(model, torch.zeros(1, 2, dtype=torch.int64), max_new_tokens=2)
    assert [m.training for m in model.modules()] == modes


def test_nothing_to_do(model):
    prompts = torch.randint(0, 37, (2, 4))
    assert generate(model, prompts, max_new_tokens=0).tolist() == prompts.tolist()
    assert generate(model, prompts[:0], max_new_tokens=3).shape[0] == 0


def test_quantised_model_generates(model):
    prompts = torch.randint(0, 37, (2, 4))
    quantize_(model)
    out = generate(model, prompts, max_new_tokens=5)
    assert out[0].tolist() == full_forward(model, prompts[0], 5).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens must have shape \(B, T\) with T > 0, got \[3\]"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, r"tokens must have shape \(B, T\) with T > 0, got \[1, 0\]"),
        ({"lengths": torch.tensor([0, 2])}, r"lengths must be 2 numbers from 1 to 3, got \[0, 2\]"),
        ({"lengths": torch.tensor([4, 2])}, r"lengths must be 2 numbers from 1 to 3, got \[4, 2\]"),
        ({"lengths": torch.tensor([1])}, r"lengths must be 2 numbers from 1 to 3, got \[1\]"),
        ({"tokens": torch.tensor([[1, 37]])}, "tokens must be ids from 0 to 36, got 37"),
        ({"tokens": torch.tensor([[-1, 2]])}, "tokens must be ids from 0 to 36, got -1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0, got 0.0"),
        ({"stop": ("x", "")}, "stop must hold no empty string, got"),
        ({"stop": "x"}, "tokenizer must be given with stop, got None"),
    ],
)
def test_bad_arguments(model, change, message):
    call = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "max_new_tokens": 2} | change
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(model, call.pop("tokens"), **call)


def test_tokens_are_integers_and_padding_is_anything(model):
    with pytest.raises(TypeError, match="generate: tokens must be integers, got float32"):
        generate(model, torch.ones(1, 2), max_new_tokens=1)
    padded, lengths = torch.tensor([[3, 4, -100], [5, 6, 7]]), torch.tensor([2, 3])
    alone = generate(model, torch.tensor([[3, 4]]), max_new_tokens=3)
    assert generate(model, padded, max_new_tokens=3, lengths=lengths)[0, :5].tolist() == alone[0].tolist()


def test_stories260k_tells_its_story(data_dir):
    want = json.loads((data_dir / "vectors" / "stories260K_greedy.json").read_text())
    model = Llama.from_pretrained(data_dir / "stories260K")
    tokenizer = load_tokenizer(data_dir / "stories260K")
    out = generate(model, torch.tensor([want["prompt_ids"]]), max_new_tokens=want["steps"])
    assert out[0].tolist() == want["ids_measured_here"]
    assert tokenizer.decode(out[0].tolist()) == want["expected_text"]


def test_real_prompts_of_different_lengths(data_dir):
    model = Llama.from_pretrained(data_dir / "stories260K")
    tokenizer = load_tokenizer(data_dir / "stories260K")
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "Lily", "The cat and the dog went to")]
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.tensor([p + [2] * (max(lengths) - len(p)) for p in prompts])
    out = generate(model, padded, max_new_tokens=40, lengths=lengths)
    for row, prompt in zip(out, prompts, strict=True):
        alone = generate(model, torch.tensor([prompt]), max_new_tokens=40)[0].tolist()
        assert row[: len(alone)].tolist() == alone


def quantized(**changes):
    config = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 37} | changes
    model = Llama(LlamaConfig(**config))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return quantize_(model, double_quant=config["n_layers"] == 2)


@pytest.mark.parametrize("changes", [{}, {"rope_layout": "interleaved"}, {"n_layers": 2, "head_dim": 10}], ids=str)
def test_blocks_in_one_call_give_the_bits_of_their_modules(changes, dtype, isa):
    model, lengths = quantized(**changes).to(dtype), torch.tensor([4, 2])
    prompts = torch.randint(0, 37, (2, 4))
    with torch.inference_mode():
        caches = [model.new_cache(2, 12) for _ in range(2)]
        assert is_plain(model, caches[0])
        fused = decoder(model, caches[0])
        for cache in caches:
            model.hidden(prompts, cache=cache, lengths=lengths)
        for tokens in torch.randint(0, 37, (8, 2)):
            assert_same_bits(fused(tokens), model.hidden(tokens[:, None], cache=caches[1])[:, -1])
        for a, b in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
            assert_same_bits(a, b)
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [12, 10]


def test_what_is_not_plain_is_decoded_by_its_modules():
    calls = []

    def hooked(model):
        model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))

    def replaced(model):
        model.layers[2].self_attn.attend = type("Other", (CausalAttention,), {})()

    def adapted(model):
        peft.apply(model, LoRAConfig(rank=2))

    def dense(model):
        model.layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)

    def biased(model):
        model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.ones(96))

    def mixed(model):
        model.layers[0].mlp.up_proj = NF4Linear.from_linear(nn.Linear(64, 96, bias=False), block_size=32)

    def compiled(model):
        model.layers[1].mlp.compile(backend="eager")

    def given_a_forward(model):
        model.layers[0].self_attn.forward = model.layers[0].self_attn.forward

    def given_a_hidden(model):
        model.hidden = model.hidden

    prompts = torch.randint(0, 37, (1, 4))
    for change in (hooked, replaced, adapted, dense, biased, mixed, compiled, given_a_forward, given_a_hidden):
        model = quantized()
        assert is_plain(model, model.new_cache(1, 2))
        change(model)
        assert not is_plain(model, model.new_cache(1, 2)), change.__name__
        assert generate(model, prompts, max_new_tokens=6)[0].tolist() == full_forward(model, prompts[0], 6).tolist()
    assert len(calls) == 6 + 6  # generate's and full_forward's


def test_a_full_cache_is_refused_and_stays():
    model = quantized()
    with torch.inference_mode():
        cache = model.new_cache(1, 3)
        model.hidden(torch.tensor([[1, 2, 3]]), cache=cache)
        with pytest.raises(ValueError, match="cache: max_len must be at least 4, got 3"):
            decoder(model, cache)(torch.tensor([4]))
        assert (cache.used, cache.lengths.tolist()) == (3, [3])
