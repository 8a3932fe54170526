"""The frame of the methods: one from outside, several together, their files, names and settings."""

import json
import textwrap

import pytest
import torch
from compare import assert_same_bits
from torch import nn

from llamakern import Llama, LlamaConfig, peft, settings
from llamakern.finetune import FinetuneConfig
from llamakern.nn import quantize_
from llamakern.peft import METHODS, LoRAConfig

TINY = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=53)
X = torch.arange(18).reshape(2, 9)

MINE = """
    from dataclasses import dataclass
    from typing import ClassVar

    import torch
    from torch import nn

    from llamakern.peft import Method, Parts
    from llamakern.peft.base import like, upper_layers


    class Scaled(nn.Module):
        def __init__(self, base, factor, like):
            super().__init__()
            self.base, self.factor = base, factor
            self.gate = nn.Parameter(torch.zeros((), **like))

        def forward(self, q, k, v, x, ctx):
            return self.base(q, k, v * (1 + self.factor * self.gate).to(v.dtype), x, ctx)


    @dataclass(frozen=True)
    class MyConfig(Method):
        \"\"\"Values times 1 + factor·gate in the upper layers.\"\"\"

        kind: ClassVar[str] = "mine"
        order: ClassVar[int] = 35

        factor: float = 1.0
        n_layers: int | None = None

        def attach(self, model):
            layers = upper_layers(model, self.n_layers, self.kind)
            made = {
                f"layers.{i}.self_attn.attend": Scaled(model.layers[i].self_attn.attend, self.factor, like(model))
                for i in layers
            }
            return Parts(made)
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(MINE))
    yield f"{file}:MyConfig"
    METHODS.pop("mine", None)


def base(packed=False):
    torch.manual_seed(1)
    model = Llama(TINY).eval()
    return quantize_(model) if packed else model


def wake(model):
    generator = torch.Generator().manual_seed(3)
    for p in peft.trainable(model).values():
        p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def config(**values):
    return settings.make(FinetuneConfig, {"base": "b", "data": "d"} | values)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_a_method_from_outside_alone_and_beside_lora(mine, tmp_path, packed):
    kind = peft.find_method(mine)
    assert peft.find_method(mine) is kind
    want = base(packed)(X)
    for configs in (kind(), [kind(factor=2.0, n_layers=2), LoRAConfig(rank=2, targets=("k_proj", "v_proj"))]):
        model = peft.apply(base(packed), configs)
        assert_same_bits(model(X), want)
        wake(model)
        assert not torch.equal(model(X), want)
        peft.save(model, tmp_path / "a", prompt={"end": 2})
        again = peft.load(base(packed), tmp_path / "a")
        assert_same_bits(again(X), model(X))
        assert again.peft_config == model.peft_config
        assert peft.trainable(again).keys() == peft.trainable(model).keys()
        assert_same_bits(peft.activate(again, None)(X), want)
        assert_same_bits(peft.activate(again, "default")(X), model(X))


def test_names_do_not_depend_on_what_stands_beside_a_method(mine, tmp_path):
    kind = peft.find_method(mine)
    alone = wake(peft.apply(base(), kind()))
    assert list(peft.trainable(alone)) == ["layers.2.self_attn.attend.gate"]
    both = peft.apply(base(), [LoRAConfig(rank=2, targets=("v_proj",)), kind()])
    peft.save(both, tmp_path / "both", base="b")
    peft.save(alone, tmp_path / "alone")
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["lora", "methods.json", "mine"]
    assert (
        json.loads((tmp_path / "both" / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "b"
    )
    mixed = peft.load(base(), tmp_path / "both" / "lora")
    assert peft.count_trainable(mixed) == 3 * 2 * (64 + 32)
    one = peft.load(base(), tmp_path / "both" / "mine")
    assert list(peft.trainable(one)) == list(peft.trainable(alone))


def test_what_cannot_stand_together_leaves_the_model_alone(mine, tmp_path):
    kind = peft.find_method(mine)
    model = base()
    want = model(X)
    for configs, message in (
        ([kind(), kind()], r"peft: config must hold each method once, got \['mine', 'mine'\]"),
        ([], "peft: config must name at least one method, got none"),
        ([3], "peft: config must be a Method such as LoRAConfig, got int"),
        ([LoRAConfig(), kind(n_layers=9)], "mine: n_layers must be at most the model's 3, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.apply(model, configs)
        assert_same_bits(model(X), want)
        assert peft.adapters(model) == []
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"merge: method must change weights only, got mine"):
        peft.merge(peft.apply(model, kind()))
    peft.save(peft.apply(base(), [kind(), LoRAConfig()]), tmp_path / "a")
    METHODS.pop("mine")
    with pytest.raises(ValueError, match=r"peft: methods must be among \['lora', .*\], got 'mine'"):
        peft.load(base(), tmp_path / "a")


def test_finding_methods(tmp_path):
    for text, name, error, message in (
        ("", "loar", ValueError, r"peft: method must be one of \['lora', .*\] or file.py:Class, got 'loar'"),
        ("", f"{tmp_path}/none.py:A", FileNotFoundError, "peft: method must name a Python file, got .*none.py"),
        ("x = 1", f"{tmp_path}/a.py:A", ValueError, "peft: .*a.py must define A, got a file without"),
        ("x = 1", f"{tmp_path}/b.py:x", ValueError, "peft: a method must be a dataclass derived from .*Method, got 1"),
    ):
        if text:
            (tmp_path / name.rpartition("/")[2].partition(":")[0]).write_text(text)
        with pytest.raises(error, match=message):
            peft.find_method(name)


def test_settings_of_several_methods(mine):
    made = config(method=f"lora,{mine}", options={"mine": {"factor": "2"}}, rank=4).peft_config()
    assert [type(c).__name__ for c in made] == ["LoRAConfig", "MyConfig"]
    assert made[0].rank == 4
    assert made[1].factor == 2.0
    assert config(method="qlora").packed
    assert config(method=mine, quantize="nf4", double_quant=True).packed
    words = ["base=b", "data=d", f"method={mine}", "mine.factor=3", "mine.n-layers=1"]
    (built,) = settings.build(FinetuneConfig, None, words).peft_config()
    assert (built.factor, built.n_layers) == (3.0, 1)


def test_a_yaml_file_may_hold_a_block_for_each_method(mine, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"base: b\ndata: d\nmethod: '{mine}'\nmine:\n  factor: 1e-1\n")
    (built,) = settings.build(FinetuneConfig, file, ["mine.n_layers=2"]).peft_config()
    assert (built.factor, built.n_layers) == (0.1, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lora,loar"}, r"peft: method must be one of \['lora', .* got 'loar'"),
        ({"options": {"excitors": {"rank": 4}}}, "finetune: options must be of the method lora, got excitors"),
        ({"options": {"lora": {"rnk": 4}}}, "settings: unknown key rnk; did you mean rank?"),
        ({"double_quant": True}, "finetune: double_quant must go with qlora or quantize=nf4, got method 'lora'"),
        ({"quantize": "nf5"}, r"finetune: quantize must be one of \[None, 'nf4'\], got 'nf5'"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_a_setting_of_lora_without_lora(mine):
    with pytest.raises(ValueError, match=r"finetune: rank must be left out without lora, got 4; .* set as mine\.rank"):
        config(method=mine, rank=4)


def test_interleaved_models_get_their_head_channels_permuted(tmp_path):
    """One adapter, two layouts of the same model: equal logits."""
    from llamakern.rotary import half_to_interleaved

    half = base()
    other = Llama(TINY.replace(rope_layout="interleaved")).eval()
    other.load_state_dict(half.state_dict())
    for layer in other.layers:
        for name, n in (("q_proj", 4), ("k_proj", 2)):
            linear = getattr(layer.self_attn, name)
            linear.weight = nn.Parameter(half_to_interleaved(linear.weight.detach(), n))
    torch.testing.assert_close(other(X), half(X))
    peft.save(wake(peft.apply(half, LoRAConfig(rank=2, dora=True))), tmp_path / "a")
    peft.load(other, tmp_path / "a")
    torch.testing.assert_close(other(X), half(X))
    peft.save(other, tmp_path / "b")
    again = peft.load(base(), tmp_path / "b")
    assert_same_bits(again(X), half(X))
