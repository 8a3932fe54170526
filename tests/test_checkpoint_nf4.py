import json

import numpy as np
import pytest
import torch
from checkpoints import assert_same_model, edit_config, edit_tensors, small
from compare import assert_same_bits
from safetensors.torch import load_file
from torch import nn

from llamakern.checkpoint import from_pretrained
from llamakern.cli import main
from llamakern.nn import NF4Linear, quantize_
from llamakern.ops.nf4 import dynamic_map


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_quantise_while_loading(tmp_path, dtype):
    model = small(tie_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, quantize="nf4")
    assert type(loaded.lm_head) is nn.Linear
    assert_same_model(loaded, quantize_(model))
    double = from_pretrained(tmp_path, quantize="nf4", double_quant=True)
    assert_same_model(double, quantize_(from_pretrained(tmp_path), double_quant=True))
    loaded.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"double_quant must be False where weights are packed already, got layers.0"):
        from_pretrained(tmp_path / "packed", quantize="nf4", double_quant=True)
    loaded = from_pretrained(tmp_path, quantize="nf4", quantize_head=True)
    assert isinstance(loaded.lm_head, NF4Linear)
    assert not loaded.config.tie_embeddings
    assert type(loaded.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("head", [False, True], ids=["body", "head"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_nf4_folder_is_bitsandbytes_and_loads_again(tmp_path, head, double_quant, dtype):
    model = quantize_(small().to(dtype), double_quant=double_quant, skip=() if head else ("lm_head",))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.mlp.down_proj.weight"  # 64 x 44: its blocks cross rows
    state = json.loads(bytes(tensors[f"{prefix}.quant_state.bitsandbytes__nf4"].tolist()))
    name = str(dtype).removeprefix("torch.")
    assert {k: state[k] for k in ("quant_type", "blocksize", "dtype", "shape")} == {
        "quant_type": "nf4", "blocksize": 64, "dtype": name, "shape": [64, 44],
    }  # fmt: skip
    assert tensors[prefix].shape == (64 * 44 // 2, 1)
    assert tensors[f"{prefix}.absmax"].shape == (44,)
    assert tensors[f"{prefix}.quant_map"].shape == (16,)
    assert (f"{prefix}.nested_absmax" in tensors) == double_quant
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_use_double_quant"]) == ("bitsandbytes", double_quant)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, NF4Linear) == head
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_dynamic_map_is_that_of_bitsandbytes(data_dir):
    want = np.load(data_dir / "vectors" / "nf4_bitsandbytes.npz")["dq_code256"]
    assert_same_bits(dynamic_map(), torch.from_numpy(want))


NF4 = "model.layers.0.mlp.up_proj.weight"


def new_state(**change):
    def edit(tensors):
        key = f"{NF4}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist())) | change
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


NF4_DAMAGE = [
    (lambda t: t.pop(NF4), "up_proj.weight must be stored with its quant_state, got none"),
    (
        lambda t: t.pop(f"{NF4}.absmax"),
        "absmax of layers.0.mlp.up_proj.weight must have 44 values of float32, got none",
    ),
    (
        lambda t: t.update({NF4: t[NF4][:-1].clone()}),
        r"weight of .* must have 1408 values of uint8, got \[1407, 1\] uint8",
    ),
    (lambda t: t[f"{NF4}.quant_map"].mul_(2), "quant_map must be the NF4 code book of bitsandbytes"),
    (new_state(shape=[10**9, 10**9]), r"up_proj.weight must have shape \[44, 64\]"),
    (new_state(shape="wide"), "must be a bitsandbytes quant_state"),
    (new_state(blocksize=48), "must be nf4 in blocks of 32, .*, nested blocks of 256"),
    (new_state(quant_type="fp4"), "must be nf4 in blocks of 32, .*, nested blocks of 256"),
    (lambda t: t[f"{NF4}.quant_state.bitsandbytes__nf4"].zero_(), "must be a bitsandbytes quant_state"),
    (lambda t: t.update({f"{NF4}.more": torch.ones(1)}), r"unexpected \[layers.0.mlp.up_proj.weight.more\]"),
]


@pytest.mark.parametrize(("edit", "message"), NF4_DAMAGE)
def test_damaged_nf4_is_named(tmp_path, edit, message):
    quantize_(small()).save_pretrained(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(tmp_path)


def test_a_packed_embedding_is_refused(tmp_path):
    model = quantize_(small(tie_embeddings=True), skip=())
    model.save_pretrained(tmp_path)

    def move(tensors):
        for key in [k for k in tensors if k.startswith("lm_head")]:
            tensors["model.embed_tokens" + key.removeprefix("lm_head")] = tensors.pop(key)
        tensors["lm_head.weight"] = torch.zeros(37, 64)

    edit_tensors(tmp_path, move)
    with pytest.raises(ValueError, match=r"checkpoint: embed_tokens.weight must be dense, got a packed NF4 weight"):
        from_pretrained(tmp_path)


@pytest.fixture
def bnb():
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name)
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("flags", [[], ["--double-quant"], ["--head"]], ids=["single", "double", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_bitsandbytes_loads_what_quantize_writes(tmp_path, flags, dtype, bnb):
    from transformers import AutoModelForCausalLM

    small(hidden_dim=128, vocab_size=64).to(dtype).save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "nf4"), *flags]) == 0
    ours = from_pretrained(tmp_path / "nf4")
    assert all(m.double_quant == ("--double-quant" in flags) for m in ours.modules() if isinstance(m, NF4Linear))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype="auto")
    assert theirs.dtype == dtype
    assert isinstance(theirs.lm_head, bnb.nn.Linear4bit) == ("--head" in flags)
    tokens = torch.randint(0, 37, (2, 16))
    for name, linear in ours.named_modules():
        if isinstance(linear, NF4Linear):
            at = name if name == "lm_head" else f"model.{name}"
            weight = theirs.get_submodule(at).weight
            assert_same_bits(linear.dequantize(dtype), bnb.functional.dequantize_4bit(weight, weight.quant_state), name)
    # In train mode bitsandbytes computes in the model's dtype, in eval mode on some machines always in bfloat16.
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(theirs.train()(tokens).logits, ours(tokens), rtol=0, atol=bound)
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours(tokens), rtol=0, atol=2e-2)


@pytest.mark.parametrize("skip", [("q_proj", "lm_head"), ("up_proj",)], ids=["q", "up"])
def test_bitsandbytes_is_told_what_stays_dense(tmp_path, skip, bnb):
    from transformers import AutoModelForCausalLM

    ours = quantize_(small(hidden_dim=128), skip=skip)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").train()
    tokens = torch.randint(0, 37, (2, 16))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
        {"bnb_4bit_compute_dtype": torch.float32},
        {"bnb_4bit_quant_storage": torch.bfloat16},
        {"llm_int8_skip_modules": ["lm_head", "o_proj"]},
    ],
    ids=["double", "single", "storage", "skip"],
)
def test_what_bitsandbytes_saved_loads(tmp_path, how, bnb):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small(hidden_dim=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **how)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    theirs.save_pretrained(tmp_path / "packed")
    ours = from_pretrained(tmp_path / "packed")
    packed = {name: m for name, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert len(packed) == 14 - 2 * ("llm_int8_skip_modules" in how)
    for name, linear in packed.items():
        weight = theirs.get_submodule(f"model.{name}").weight
        want = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert_same_bits(linear.dequantize(torch.bfloat16), want, name)


def test_what_bitsandbytes_reordered_is_refused(tmp_path, bnb):
    """The first forward in eval mode turns the weight into the order of a CPU kernel; absmax stays in it when saved."""
    model = quantize_(small(hidden_dim=128))
    model.save_pretrained(tmp_path)

    def reorder(tensors):
        tensors[f"{NF4}.absmax"] = tensors[f"{NF4}.absmax"].view(-1, 1).T.to(torch.bfloat16).contiguous()

    edit_tensors(tmp_path, reorder)
    with pytest.raises(ValueError, match=r"up_proj.weight and its absmax must be columns .* before its first forward"):
        from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({NF4: t[NF4].view(128, 32)}))
    with pytest.raises(ValueError, match=r"got shapes \[128, 32\] and \[128\]"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(("how", "got"), [({"bnb_4bit_quant_type": "fp4"}, "fp4"), ({"load_in_8bit": True}, "int8")])
def test_other_types_of_bitsandbytes_are_refused(tmp_path, how, got):
    small().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", **how})
    with pytest.raises(ValueError, match=f"the bitsandbytes type of .* must be 'nf4', got '{got}'"):
        from_pretrained(tmp_path)


def test_nf4_costs_little_on_real_text(data_dir):
    from llamakern.tokenizer import load_tokenizer

    folder = data_dir / "stories260K"
    tokenizer = load_tokenizer(folder)
    text = (data_dir / "tinystories-text" / "tinystories_sample_2MiB.txt").read_text()
    stories = [s.strip() for s in text.split("<|endoftext|>")][1:41]

    def mean_loss(model):
        with torch.inference_mode():
            ids = [torch.tensor([tokenizer.encode(s)[:512]]) for s in stories]
            return torch.stack([model.loss(i[:, :-1], i[:, 1:]) for i in ids]).mean().item()

    dense, packed = (mean_loss(from_pretrained(folder, quantize=q)) for q in (None, "nf4"))
    assert dense < 1.4
    assert packed - dense <= 0.12
