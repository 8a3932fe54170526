"""Features of a frozen encoder as prompts, in rows, the cache and training; a model that must use them to answer."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits

from llamakern import Llama, LlamaConfig, TrainConfig, Trainer, generate, peft
from llamakern.data import Example, pack, pad
from llamakern.nn import quantize_
from llamakern.peft import AdapterConfig, AdapterV2Config

TINY = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=53)
X = torch.arange(18).reshape(2, 9)
SMALL = {"visual_dim": 6, "visual_width": 32, "visual_depth": 2, "visual_heads": 4}
METHODS = {
    "v1": AdapterConfig(prompt_len=4, visual_dim=6, visual_len=3, visual_hidden=16),
    "v2-late": AdapterV2Config("multimodal7b", prompt_len=4, **SMALL),
    "v2-early": AdapterV2Config("paper", prompt_len=4, visual_len=5, **SMALL),
    "v2-chat": AdapterV2Config("chat65b", visual_len=5, **SMALL),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def base(packed=False):
    torch.manual_seed(1)
    model = Llama(TINY).eval()
    return quantize_(model, block_size=32) if packed else model


def wake(model):
    generator = torch.Generator().manual_seed(3)
    for p in peft.trainable(model).values():
        p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def features(B=2, seed=4):
    return torch.randn(B, 3, 6, generator=torch.Generator().manual_seed(seed))


@EACH
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_starts_at_the_base_and_then_sees_the_features(method, packed):
    want = base(packed)(X)
    model = peft.apply(base(packed), method)
    assert torch.equal(model(X, features=features()), want)
    assert torch.equal(model(X), want)
    wake(model)
    seen = model(X, features=features())
    assert not torch.equal(seen, model(X))
    assert not torch.equal(seen, model(X, features=features(seed=5)))
    swapped = model(X.flip(0), features=features().flip(0)).flip(0)
    torch.testing.assert_close(swapped, seen, rtol=1e-4, atol=1e-5)
    one = model(X[1:], features=features()[1:])
    torch.testing.assert_close(one, seen[1:], rtol=1e-4, atol=1e-5)


@EACH
def test_every_tensor_receives_a_gradient(method):
    model = wake(peft.apply(base(), method))
    model.loss(X, X, features=features()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in peft.trainable(model).values())


@EACH
def test_cached_decode_equals_the_full_forward(method):
    model = wake(peft.apply(base(), method))
    got = generate(model, X[:, :4], max_new_tokens=6, features=features())
    want = X[:, :4]
    for _ in range(6):
        want = torch.cat((want, model(want, features=features())[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, want)


@EACH
def test_files_come_back_bit_for_bit(tmp_path, method):
    model = wake(peft.apply(base(), method))
    peft.save(model, tmp_path / "a")
    again = peft.load(base(), tmp_path / "a")
    assert_same_bits(again(X, features=features()), model(X, features=features()))
    assert_same_bits(peft.activate(again, None)(X), base()(X))
    assert again.visual is None


def test_visual_rows_are_prompts():
    """V1: a vector on every prompt; V2's late fusion: a row on each; early fusion: the lowest layer's own prompts."""
    for name in ("v1", "v2-late"):
        model = wake(peft.apply(base(), METHODS[name]))
        rows = model.visual(features())
        plain = wake(peft.apply(base(), METHODS[name]))
        for layer in (*model.layers, *plain.layers):
            if hasattr(layer.self_attn.attend, "prompts"):
                twin = plain.layers[layer.self_attn.layer].self_attn.attend
                twin.prompts.data = model.layers[layer.self_attn.layer].self_attn.attend.prompts.data + rows[0]
        torch.testing.assert_close(plain(X[:1]), model(X[:1], features=features()[:1]), rtol=1e-4, atol=1e-5)
    early = wake(peft.apply(base(), METHODS["v2-early"]))
    assert early.layers[0].self_attn.attend.prompts is None
    assert early.visual(features()).shape == (2, 5, 64)


def test_blocks_are_those_of_a_vision_transformer():
    from llamakern.peft.visual import VisualBlock

    torch.manual_seed(0)
    ours = VisualBlock(32, 4, {"dtype": torch.float32})
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {
        "self_attn.in_proj_weight": "attn.qkv.weight", "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj.weight": "attn.proj.weight", "self_attn.out_proj.bias": "attn.proj.bias",
        "linear1.weight": "mlp.fc1.weight", "linear1.bias": "mlp.fc1.bias", "linear2.weight": "mlp.fc2.weight",
        "linear2.bias": "mlp.fc2.bias",
    }  # fmt: skip
    state = ours.state_dict()
    theirs.load_state_dict({name: state[names.get(name, name)] for name in theirs.state_dict()})
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@EACH
def test_a_model_learns_what_only_the_features_say(method):
    """The answer to one and the same prompt is the number that stands in the features."""
    torch.manual_seed(0)
    numbers = torch.randint(4, (96,))
    rows = F.one_hot(numbers, 6).float()[:, None].repeat(1, 3, 1) * 2
    examples = [
        Example([1, 7, 10 + int(n)], [False, False, True], False, "", row) for n, row in zip(numbers, rows, strict=True)
    ]
    torch.manual_seed(2)
    model = base()
    model.lm_head.weight.data.mul_(30)  # a random head's logits are too close to each other to decide anything
    peft.apply(model, method)
    config = TrainConfig(steps=120, batch_size=16, lr=2e-2, warmup=2, packing=False)
    result = Trainer(model, examples[:80], config, held_out=examples[80:], quiet=True).train()
    assert result["loss_before"] > 3
    assert result["loss_after"] < 0.3  # ln 4 = 1.39 is the best without them
    batch = pad(examples[80:], 0)
    answers = generate(model, batch.tokens, max_new_tokens=1, features=batch.features)[:, -1]
    assert torch.equal(answers, 10 + numbers[80:])


def test_bad_calls():
    model = peft.apply(base(), METHODS["v1"])
    example = Example([1, 2], [True, True], False, "", torch.zeros(3, 6))
    for call, message in (
        (lambda: model(X, features=torch.zeros(2, 3, 5)), r"features must have shape \(B, 3, 6\), got \[2, 3, 5"),
        (lambda: model(X, features=torch.zeros(1, 3, 6)), r"model: features must have shape \(2, Nv, Dv\), got \[1, 3"),
        (
            lambda: model(X[:1], features=features()[:1], cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)),
            "model: cu_seqlens must be None with features, which belong to rows",
        ),
        (lambda: pack([example], 64, 0), "data: packing must be off for examples with features"),
        (lambda: pad([example, example._replace(features=None)], 0), "data: features must stand in every example"),
        (
            lambda: peft.apply(base(), [AdapterConfig(), AdapterV2Config()]),
            "adapter: model must carry one method with prompts in attention, got a second",
        ),
        (
            lambda: peft.apply(base(), AdapterV2Config("paper", n_layers=3, visual_dim=6)),
            "adapter_v2: n_layers must leave the lowest layer to visual prompts, got 3",
        ),
        (lambda: AdapterV2Config("multimodal7b", 0, visual_dim=6), "prompt_len must be above 0 for late fusion, got 0"),
        (lambda: AdapterV2Config(visual_heads=7), "adapter_v2: visual_heads must divide 768, got 7"),
        (lambda: AdapterConfig(visual_dim=0), "adapter: visual_dim must be a positive integer, got 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
