"""LLaMA-Adapter V2: three parameterisations around dense, NF4 and LoRA linears; counts, gradients, files, merging."""

import pytest
import torch
from compare import assert_as_good_as, assert_same_bits
from torch import nn

from llamakern import Llama, LlamaConfig, peft
from llamakern.nn import LoRALinear, NF4Linear, quantize_
from llamakern.peft import AdapterV2Config, LoRAConfig
from llamakern.peft.adapter_v2 import VARIANTS, ScaledLinear

TINY = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=53)
X = torch.arange(18).reshape(2, 9)
EACH = pytest.mark.parametrize("variant", VARIANTS)
BASE = pytest.mark.parametrize("kind", ["dense", "nf4", "lora", "nf4-lora", "dora"])


def base(packed=False, dtype=torch.float32):
    torch.manual_seed(1)
    model = Llama(TINY).eval().to(dtype)
    return quantize_(model, block_size=32) if packed else model


def wake(model, std=0.2):
    generator = torch.Generator().manual_seed(3)
    for p in peft.trainable(model).values():
        p.data.add_(std * torch.randn(p.shape, generator=generator))
    return model


def around(kind, bias=False, N=40, K=64):
    """A linear of this kind with its dense weight in float64."""
    torch.manual_seed(2)
    linear = nn.Linear(K, N, bias)
    linear = NF4Linear.from_linear(linear, block_size=32) if "nf4" in kind else linear
    if kind in ("lora", "nf4-lora", "dora"):
        linear = LoRALinear(linear, 3, 0.5, dora=kind == "dora")
        linear.lora_b.data.normal_(std=0.3)
        return linear.requires_grad_(False), linear.merged_weight().double()
    w = linear.dequantize() if kind == "nf4" else linear.weight.detach()
    return linear.requires_grad_(False), w.double()


def definition(variant, x, w, own, scale, shift):
    if variant == "paper":
        return scale * (x @ w.T + own + shift)
    return (x if scale is None else scale * x) @ w.T + own + shift


@EACH
@BASE
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_forward_and_gradients_against_float64(variant, kind, bias, dtype):
    linear, w = around(kind, bias)
    if "lora" not in kind and kind != "dora" and kind == "dense":
        linear, w = linear.to(dtype), linear.to(dtype).weight.detach().double()
    elif kind in ("lora", "dora"):
        linear.base.to(dtype)
        w = linear.merged_weight().double()
    module = ScaledLinear(linear, variant, {"dtype": torch.float32})
    for p in (module.scale, module.shift):
        if p is not None:
            p.data.add_(0.3 * torch.randn(p.shape))
    own = (linear.base if hasattr(linear, "base") else linear).bias
    own = torch.zeros(40, dtype=torch.float64) if own is None else own.detach().double()
    x, dy = torch.randn(3, 5, 64).to(dtype).requires_grad_(), torch.randn(3, 5, 40).to(dtype)
    leaves = [x, module.shift, *([] if module.scale is None else [module.scale])]
    got = module(x)
    gradients = torch.autograd.grad(got, leaves, dy)

    def reference(wide):
        like = torch.float64 if wide == torch.float64 else torch.float32
        mine = [t.detach().to(wide if t is x else like).requires_grad_() for t in leaves]
        xs, shift, *scale = (t.to(wide) for t in mine)
        y = definition(variant, xs, w.to(wide), own.to(wide), *(scale or [None]), shift)
        return y, torch.autograd.grad(y, mine, dy.to(wide))

    truth, true_gradients = reference(torch.float64)
    eager, eager_gradients = reference(dtype)
    assert_as_good_as("y", got, eager, truth)
    for name, g, e, t in zip(("dx", "db", "ds"), gradients, eager_gradients, true_gradients, strict=False):
        assert_as_good_as(name, g, e, t)
        assert g.dtype == (dtype if name == "dx" else torch.float32)


@EACH
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_starts_at_the_base_bit_for_bit(variant, packed, lora, dtype):
    want = base(packed, dtype)(X)
    configs = [AdapterV2Config(variant), *([LoRAConfig(rank=2)] if lora else [])]
    model = peft.apply(base(packed, dtype), configs)
    assert torch.equal(model(X), want)
    assert not torch.equal(wake(model)(X), want)
    assert torch.equal(peft.activate(model, None)(X), want)


def test_trainable_counts_of_the_papers_models():
    def count(preset, variant, prompt_len=0):
        with torch.device("meta"):
            model = peft.apply(Llama(LlamaConfig.preset(preset)), AdapterV2Config(variant, prompt_len))
        norms = sum(p.numel() for name, p in peft.trainable(model).items() if "norm" in name)
        gates = sum(p.numel() for name, p in peft.trainable(model).items() if name.endswith("gate"))
        return peft.count_trainable(model) - norms - gates, norms

    assert count("llama-7b", "paper") == (2_719_744, 266_240)
    assert count("llama-7b", "chat65b") == (2_498_560, 266_240)
    assert count("llama-7b", "multimodal7b") == (1_097_728, 266_240)
    assert count("llama-13b", "paper") == (4_259_840, 414_720)
    assert count("llama-13b", "chat65b") == (3_911_680, 414_720)
    assert count("llama-65b", "paper") == (13_598_720, 1_318_912)
    assert sum(count("llama-65b", "chat65b")) == 13_811_712


@EACH
@pytest.mark.parametrize("form", [None, "bf16", "nf4"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_merging(tmp_path, variant, form, lora, packed):
    configs = [AdapterV2Config(variant, prompt_len=0), *([LoRAConfig(rank=2)] if lora else [])]
    model = wake(peft.apply(base(packed), configs), 0.1)
    before = model(X)
    report = peft.merge_report(model, X, to=form)
    assert not any(isinstance(module, ScaledLinear | LoRALinear) for module in model.modules())
    assert report.effect > 0.05
    assert report.max < {None: 1e-4, "bf16": 0.4, "nf4": 2.0}[form] * before.abs().max()
    model.save_pretrained(tmp_path / "merged")
    again = Llama.from_pretrained(tmp_path / "merged")
    assert again.config.attention_bias
    assert again.config.mlp_bias
    torch.testing.assert_close(again(X).float(), model(X).float(), rtol=1e-2, atol=1e-2)


def test_a_merged_model_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = wake(peft.apply(base(), AdapterV2Config("multimodal7b", prompt_len=0)), 0.1)
    want = model(X)
    peft.merge(model).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(X).logits, want, rtol=1e-4, atol=1e-4)
    quantized = Llama.from_pretrained(tmp_path, quantize="nf4")
    quantized.save_pretrained(tmp_path / "nf4")
    assert_same_bits(Llama.from_pretrained(tmp_path / "nf4")(X), quantized(X))


@EACH
def test_files_come_back_bit_for_bit(tmp_path, variant):
    model = wake(peft.apply(base(), [AdapterV2Config(variant), LoRAConfig(rank=2, targets=("o_proj",))]))
    peft.save(model, tmp_path / "a")
    again = peft.load(base(), tmp_path / "a")
    assert_same_bits(again(X), model(X))
    one = peft.load(base(), tmp_path / "a" / "adapter_v2")
    assert type(one.layers[0].self_attn.q_proj) is ScaledLinear


@EACH
def test_interleaved_models_get_their_head_channels_permuted(tmp_path, variant):
    from llamakern.rotary import half_to_interleaved

    half = base()
    other = Llama(TINY.replace(rope_layout="interleaved")).eval()
    other.load_state_dict(half.state_dict())
    for layer in other.layers:
        for name, n in (("q_proj", 4), ("k_proj", 2)):
            linear = getattr(layer.self_attn, name)
            linear.weight = nn.Parameter(half_to_interleaved(linear.weight.detach(), n))
    peft.save(wake(peft.apply(half, AdapterV2Config(variant))), tmp_path / "a")
    peft.load(other, tmp_path / "a")
    torch.testing.assert_close(other(X), half(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterV2Config("65b"), r"adapter_v2: variant must be one of \['paper', .*\], got '65b'"),
        (lambda: AdapterV2Config(prompt_len=-1), "adapter_v2: prompt_len must be an integer from 0 on, got -1"),
        (lambda: AdapterV2Config(n_layers=0), "adapter_v2: n_layers must be an integer from 1 on, got 0"),
        (lambda: AdapterV2Config(prompt_init_std=0), "adapter_v2: prompt_init_std must be finite and above 0, got 0"),
        (lambda: peft.apply(nn.Linear(2, 2), AdapterV2Config()), "adapter_v2: model must be a llamakern.Llama"),
    ],
)
def test_bad_calls(make, message):
    with pytest.raises(ValueError, match=message):
        make()
