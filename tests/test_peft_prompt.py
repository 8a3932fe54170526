"""Prompt tuning: virtual tokens before rows and packed sequences, in the cache, in PEFT's files. Full fine-tuning."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from safetensors.torch import load_file
from torch import nn

from llamakern import Llama, LlamaConfig, generate, peft
from llamakern.data import Example, pack, pad
from llamakern.nn import quantize_
from llamakern.peft import FullConfig, LoRAConfig, PromptConfig

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=53)
X = torch.arange(18).reshape(2, 9)
WEIGHTS = "adapter_model.safetensors"


def base(packed=False, dtype=torch.float32):
    torch.manual_seed(1)
    model = Llama(TINY).eval().to(dtype)
    return quantize_(model) if packed else model


def tuned(packed=False, P=5, **knobs):
    model = base(packed)
    torch.manual_seed(2)
    return peft.apply(model, PromptConfig(P, init="normal", init_std=0.5, **knobs))


def by_embeddings(model, tokens):
    """The layers on the embeddings themselves: what prompt tuning means."""
    from llamakern.model import AttendContext
    from llamakern.rotary import cos_sin

    x = torch.cat((model.prefix.expand(len(tokens), -1, -1), model.embed_tokens(tokens)), 1)
    cos, sin = cos_sin(model.config, torch.arange(x.shape[1]))
    delta = None
    for layer in model.layers:
        x, delta = layer(x, delta, AttendContext(cos=cos, sin=sin))
    return model.lm_head(model.norm(delta, residual=x)[0][:, len(model.prefix) :])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_equals_the_layers_on_the_longer_row(packed):
    model = tuned(packed)
    assert_same_bits(model(X), by_embeddings(model, X))
    assert list(peft.trainable(model)) == ["prefix"]
    assert peft.count_trainable(model) == 5 * 64
    assert_same_bits(peft.activate(model, None)(X), base(packed)(X))


def test_packed_rows_equal_padded_ones_and_each_alone():
    examples = [Example(list(range(i, i + n)), [True] * n, False, "") for i, n in ((3, 7), (20, 4), (9, 12), (1, 2))]
    losses, gradients = [], []
    for batch in (pad(examples, 0), pack(examples, 32, 0)):
        model = tuned()
        loss = model.loss(batch.tokens, batch.labels, positions=batch.positions, cu_seqlens=batch.cu_seqlens)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.prefix.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3
    batch, model = pack(examples, 32, 0), tuned()
    together = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens)
    for start, example in zip(batch.cu_seqlens.tolist(), examples, strict=False):
        alone = model(torch.tensor([example.inputs]))
        torch.testing.assert_close(together[:, start : start + len(example.inputs)], alone, rtol=1e-4, atol=1e-5)


def test_two_backwards_are_the_same_to_the_last_bit():
    examples = [Example(list(range(n)), [True] * n, False, "") for n in (7, 4, 12, 2)]
    batch, model = pack(examples, 64, 0), tuned()
    for kept in (None, {}):
        model.loss(batch.tokens, batch.labels, positions=batch.positions, cu_seqlens=batch.cu_seqlens).backward()
        if kept is None:
            first, model.prefix.grad = model.prefix.grad, None
    assert_same_bits(model.prefix.grad, first)


def test_gradient_is_that_of_the_longer_row():
    upstream, gradients = torch.randn(2, 9, 53), []
    for forward in (lambda model: model(X), lambda model: by_embeddings(model, X)):
        model = tuned()
        (forward(model) * upstream).sum().backward()
        gradients.append(model.prefix.grad)
    assert_same_bits(*gradients)
    assert gradients[0].abs().min(1).values.max() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_cached_decode_equals_the_full_forward(packed):
    model = tuned(packed)
    got = generate(model, X[:, :4], max_new_tokens=8)
    want = X[:, :4]
    for _ in range(8):
        want = torch.cat((want, model(want)[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, want)
    lengths = torch.tensor([4, 2])
    ragged = generate(model, X[:, :4], lengths=lengths, max_new_tokens=6)
    for row, n in enumerate(lengths.tolist()):
        alone = generate(model, X[row : row + 1, :n], max_new_tokens=6)
        assert torch.equal(ragged[row, : n + 6], alone[0])
    cache = model.new_cache(2, 9)
    parts = [model(X[:, :4], cache=cache), model(X[:, 4:], cache=cache, positions=torch.arange(4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(X), rtol=1e-4, atol=1e-5)


def test_a_mask_keeps_its_meaning():
    model = tuned()
    mask = torch.ones(9, 9, dtype=torch.bool)
    assert_same_bits(model(X, mask=mask), model(X))
    mask[:, 2] = False
    mask[2, 2] = True
    assert not torch.equal(model(X, mask=mask)[:, 5:], model(X)[:, 5:])


def test_starts():
    model = base()
    table = model.embed_tokens.weight
    made = peft.apply(model, PromptConfig(5, init_tokens=(7, 3))).prefix
    assert_same_bits(made, table[[7, 3, 7, 3, 7]])
    made = peft.apply(base(), PromptConfig(5)).prefix
    assert all((row == table).all(1).any() for row in made)


@pytest.mark.parametrize("configs", [PromptConfig(3), [PromptConfig(3), LoRAConfig(rank=2, targets=("v_proj",))]])
def test_files_come_back_bit_for_bit(tmp_path, configs):
    model = peft.apply(base(), configs)
    for p in peft.trainable(model).values():
        p.data.normal_()
    peft.save(model, tmp_path / "a")
    again = peft.load(base(), tmp_path / "a")
    assert_same_bits(again(X), model(X))
    peft.save(again, tmp_path / "b")
    for file in sorted((tmp_path / "a").rglob("*.safetensors")):
        other = load_file(tmp_path / "b" / file.relative_to(tmp_path / "a"))
        for key, t in load_file(file).items():
            assert_same_bits(other[key], t, key)


def test_to_peft_and_back(tmp_path):
    transformers, theirs = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base().save_pretrained(tmp_path / "base")

    def hub():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    ours = peft.apply(base(), PromptConfig(4))
    peft.save(ours, tmp_path / "ours", base="base")
    read = theirs.PeftModel.from_pretrained(hub(), tmp_path / "ours").eval()
    torch.testing.assert_close(read(X).logits[:, 4:], ours(X), rtol=1e-4, atol=1e-5)
    config = theirs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    made = theirs.get_peft_model(hub(), config).eval()
    made.save_pretrained(tmp_path / "theirs")
    loaded = peft.load(base(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(X), made(X).logits[:, 4:], rtol=1e-4, atol=1e-5)
    peft.save(loaded, tmp_path / "again")
    first, second = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys() == {"prompt_embeddings"}
    assert_same_bits(first["prompt_embeddings"], second["prompt_embeddings"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptConfig(0), "prompt: prompt_len must be a positive integer, got 0"),
        (lambda: PromptConfig(init="text"), r"prompt: init must be one of \['vocab', 'normal'\], got 'text'"),
        (lambda: PromptConfig(init_tokens=()), "prompt: init_tokens must hold at least one id, got none"),
        (
            lambda: peft.apply(base(), PromptConfig(init_tokens=(53,))),
            r"prompt: init_tokens must be ids from 0 to 52, got \[53\]",
        ),
        (lambda: peft.apply(nn.Linear(2, 2), PromptConfig()), "prompt: model must be a llamakern.Llama, got Linear"),
        (lambda: PromptConfig.read({"num_virtual_tokens": 3, "num_transformer_submodules": 2}), "not supported"),
        (lambda: peft.merge(tuned()), "merge: method must change weights only, got prompt"),
        (lambda: peft.apply(base(True), FullConfig()), "full: model must be dense, got packed weights"),
        (lambda: peft.apply(base(dtype=torch.bfloat16), FullConfig()), "full: model must be float32, .* got bfloat16"),
        (
            lambda: peft.apply(base(), [FullConfig(), LoRAConfig()]),
            r"peft: full must stand alone, got \['full', 'lora'\]",
        ),
        (
            lambda: peft.apply(peft.apply(base(), FullConfig()), LoRAConfig(), name="b"),
            "peft: model must keep its base to carry more, got 'default', which trains it",
        ),
        (
            lambda: peft.activate(peft.apply(base(), FullConfig()), None),
            "peft: name must stay 'default', got None: full fine-tuning changed the base itself",
        ),
    ],
)
def test_bad_calls(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_full_fine_tuning_trains_everything_and_comes_back(tmp_path):
    model = peft.apply(base(), FullConfig())
    assert peft.count_trainable(model) == sum(p.numel() for p in model.parameters())
    assert_same_bits(model(X), base()(X))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    F.cross_entropy(model(X).flatten(0, 1), X.flatten()).backward()
    optimizer.step()
    peft.save(model, tmp_path / "a")
    again = peft.load(base(), tmp_path / "a")
    assert_same_bits(again(X), model(X))
    assert not torch.equal(again(X), base()(X))
    report = peft.merge_report(again, X)
    assert (report.max, report.effect) == (0, None)
    assert "full" not in str(report)
    again.save_pretrained(tmp_path / "b")
    assert_same_bits(Llama.from_pretrained(tmp_path / "b")(X), model(X))
