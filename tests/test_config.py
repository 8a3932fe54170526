import json
import math

import pytest
import torch

from llamakern.config import PRESETS, LlamaConfig, RopeScaling
from llamakern.model import Llama
from llamakern.rotary import cos_sin, frequencies, interleaved_to_half

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
}

# config.json of Llama 3.2 1B, as transformers 4 and 5 write it
OLD = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
    "torch_dtype": "bfloat16", "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
NEW = {key: value for key, value in OLD.items() if not key.startswith(("rope", "torch"))} | {
    "dtype": "bfloat16",
    "rope_parameters": OLD["rope_scaling"] | {"rope_theta": 500000.0},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert all(p.is_meta for p in model.parameters())


def test_every_preset_is_counted():
    assert PRESETS.keys() == PARAMETERS.keys()


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"config: preset must be one of llama-7b, .*llama3.3-70b, got 'llama9'"):
        LlamaConfig.preset("llama9")


@pytest.mark.parametrize("hf", [OLD, NEW], ids=["old", "new"])
def test_reads_both_spellings(hf):
    assert LlamaConfig.from_hf(hf) == LlamaConfig.preset("llama3.2-1b")


@pytest.mark.parametrize("name", PRESETS)
def test_to_hf_and_back(name):
    config = LlamaConfig.preset(name)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_defaults():
    hf = {k: OLD[k] for k in OLD if k not in ("num_key_value_heads", "head_dim", "rope_scaling", "rope_theta")}
    config = LlamaConfig.from_hf(hf | {"eos_token_id": [5, 6]})
    assert (config.n_kv_heads, config.head_dim, config.rope_theta, config.rope_scaling) == (32, 64, 10000.0, None)
    assert config.eos_id == (5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "config: model_type must be 'llama', got 'gpt2'"),
        ({"attention_bias": 1}, "config: attention_bias must be true or false, got 1"),
        ({"hidden_act": "gelu"}, "config: hidden_act must be 'silu', got 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "config: rope_type must be 'default' or 'llama3', got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "config: rope_scaling must hold factor, low_freq_factor"),
        ({"hidden_size": None}, "config: config.json must hold hidden_size, .*, got none of hidden_size"),
        ({"hidden_size": "many"}, "config: dim must be a positive integer, got 'many'"),
        ({"hidden_size": 2**31}, r"config: dim must be below 2\^31, got 2147483648"),
        ({"num_hidden_layers": 0}, "config: n_layers must be a positive integer, got 0"),
        ({"num_key_value_heads": 7}, "config: n_heads must be divisible by n_kv_heads, got 32 and 7"),
        ({"head_dim": 65}, "config: head_dim must be even, got 65"),
        ({"vocab_size": 2**31}, r"config: vocab_size must be below 2\^31, got 2147483648"),
        ({"rope_scaling": ["x"]}, r"config: rope_parameters and rope_scaling must be objects, got \['x'\]"),
        ({"tie_word_embeddings": "no"}, "config: tie_embeddings must be true or false, got 'no'"),
        ({"bos_token_id": "1"}, "config: bos_id must be a token id, several or none, got '1'"),
        ({"eos_token_id": [1, None]}, r"config: eos_id must be a token id, several or none, got \(1, None\)"),
        ({"rope_theta": float("inf")}, "config: rope_theta must be a positive number, got inf"),
        ({"rms_norm_eps": "tiny"}, "config: norm_eps must be a positive number, got 'tiny'"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(OLD | change)


def test_bad_fields():
    with pytest.raises(ValueError, match="config: dim must be divisible by n_heads, got 10 and 3"):
        LlamaConfig(dim=10, n_heads=3)
    with pytest.raises(ValueError, match="config: rope_layout must be 'half' or 'interleaved', got 'whole'"):
        LlamaConfig(rope_layout="whole")
    with pytest.raises(ValueError, match="config: rope_layout must be 'half' in a Hugging Face config"):
        LlamaConfig(rope_layout="interleaved").to_hf()


def test_llama3_scaling_as_transformers_computes_it(data_dir):
    want = json.loads((data_dir / "vectors" / "llama3_rope_hf.json").read_text())
    scaling = RopeScaling(
        want["factor"], want["low_freq_factor"], want["high_freq_factor"], want["original_max_position_embeddings"]
    )
    D = want["head_dim"]
    config = LlamaConfig(dim=D, n_heads=1, head_dim=D, rope_theta=want["theta"], rope_scaling=scaling)
    expected = torch.tensor(want["expected_inv_freq"], dtype=torch.float64)
    torch.testing.assert_close(frequencies(config), expected, rtol=want["rtol"], atol=0)


def test_scaling_without_a_middle():
    """low == high: a frequency is kept or divided, nothing between, and nothing is divided by zero."""
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0)
    config = LlamaConfig(dim=128, n_heads=1, rope_scaling=scaling)
    plain = frequencies(config.replace(rope_scaling=None))
    turns = plain * 8192 / (2 * torch.pi)
    assert torch.equal(frequencies(config), torch.where(turns >= 1, plain, plain / 16))


def test_angles_keep_their_precision_far_out():
    """float32 angles would be wrong in the second digit at position 10 million."""
    config = LlamaConfig(dim=8, n_heads=1)
    cos, sin = cos_sin(config, torch.tensor([[10_000_000, 3]]))
    assert cos.shape == sin.shape == (1, 2, 4)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0, 0].item(), math.cos(1e7), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0, 0, 0].item(), math.sin(1e7), rtol=0, atol=1e-6)


def test_interleaved_rows_become_halves():
    rows = torch.arange(12).view(12, 1)  # 2 heads of 6
    assert interleaved_to_half(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
