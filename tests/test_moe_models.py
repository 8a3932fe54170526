"""Models with experts against transformers' own: small random ones, float32."""

import pytest
import torch
from moe_models import KINDS, build, gradients, hf_model, our_model, renamed

from llamakern import Llama, generate
from llamakern.model import default_positions


def assert_close(ours, theirs, name="", rtol=1e-4):
    scale = theirs.abs().max().clamp_min(1e-12)
    assert (ours - theirs).abs().max() <= rtol * scale, f"{name}: off by {(ours - theirs).abs().max() / scale:.1e}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{kind: (transformers' model, ours from its files, the folder)}"""
    pytest.importorskip("transformers")
    return {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients(kind, pairs):
    theirs, ours, _ = pairs[kind]
    tokens = torch.randint(3, 96, (2, 21))
    logits = theirs(tokens).logits
    assert_close(ours(tokens), logits.detach(), "logits")
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), 1)
    loss = theirs(tokens, labels=tokens).loss
    mine = ours.loss(tokens, labels)
    assert_close(mine.detach(), loss.detach(), "loss")
    want = renamed(kind, ours.config, gradients(theirs, loss))
    got = gradients(ours, mine)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert_close(got[name], grad, name)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decode_is_the_full_forward(kind, pairs):
    """The prompt ends before a chunk's boundary, decoding goes past it."""
    theirs, ours, _ = pairs[kind]
    tokens = torch.randint(3, 96, (2, 6))
    got = generate(ours, tokens, max_new_tokens=14)
    want = theirs.generate(tokens, max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, want)
    cache = ours.new_cache(2, 20)
    with torch.no_grad():
        steps = [ours(piece, cache=cache) for piece in want.split([6, 1, 5, 8], 1)]
        assert_close(torch.cat(steps, 1), theirs(want).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_each_alone(kind, pairs):
    _, ours, _ = pairs[kind]
    tokens = torch.randint(3, 96, (1, 40))
    cu = torch.tensor([0, 11, 12, 31, 40], dtype=torch.int32)
    positions = default_positions(40, None, cu, tokens.device)
    whole = ours(tokens, cu_seqlens=cu, positions=positions)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        assert_close(whole[:, begin:end].detach(), ours(tokens[:, begin:end]).detach())


def test_temperature_and_chunks_are_at_work(pairs):
    """What the tests above compare depends on each of LLaMA 4's parts."""
    _, ours, _ = pairs["llama4"]
    tokens = torch.randint(3, 96, (1, 24))
    want = ours(tokens)
    for change in (
        {"attn_scale": 0.0}, {"attention_chunk": None}, {"qk_norm": None}, {"nope_layers": ()},
        {"rope_layout": "half"},
    ):  # fmt: skip
        other = Llama(ours.config.replace(**change))
        other.load_state_dict(ours.state_dict())
        assert (other(tokens) - want).abs().max() > 1e-3, change


def test_placeholders_take_their_embeddings(pairs):
    theirs, ours, _ = pairs["llama4"]
    tokens, embeds = torch.randint(3, 96, (2, 9)), torch.randn(2, 9, ours.config.dim)
    holes = tokens.clone()
    holes[:, 2:5] = -1
    x = theirs.get_input_embeddings()(tokens)
    x[:, 2:5] = embeds[:, 2:5]
    assert_close(ours(holes, inputs_embeds=embeds).detach(), theirs(inputs_embeds=x).logits.detach())
    with pytest.raises(ValueError, match=r"model: inputs_embeds must have shape \[2, 9, 64\], got \[2, 9, 3\]"):
        ours(holes, inputs_embeds=embeds[..., :3])


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_is_what_transformers_reads(kind, pairs, tmp_path):
    _, ours, _ = pairs[kind]
    ours.save_pretrained(tmp_path)
    tokens = torch.randint(3, 96, (1, 20))
    want = ours(tokens).detach()
    assert_close(hf_model(tmp_path)(tokens).logits.detach(), want)
    again = Llama.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(tokens).detach(), want)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_while_loading_and_saved(kind, double_quant, pairs, tmp_path):
    from llamakern.nn import Experts, NF4Experts, NF4Linear, Router, quantize_

    _, _, folder = pairs[kind]
    model = Llama.from_pretrained(folder, quantize="nf4", double_quant=double_quant)
    kinds = {type(m) for m in model.modules()}
    assert {NF4Experts, NF4Linear, Router} <= kinds
    assert Experts not in kinds
    tokens = torch.randint(3, 96, (1, 20))
    want = model(tokens).detach()
    same = quantize_(our_model(folder), double_quant=double_quant)
    assert torch.equal(same(tokens).detach(), want)
    model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).detach(), want)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
