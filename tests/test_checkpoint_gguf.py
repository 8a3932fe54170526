"""llama.cpp's files: written by its own package from a model of ours, they give that model's numbers back."""

import struct
import sys

import numpy as np
import pytest
import torch
from checkpoints import assert_same_model, decoded, small, write_gguf
from compare import assert_same_bits

from llamakern.checkpoint import from_pretrained
from llamakern.cli import main
from llamakern.config import RopeScaling
from llamakern.nn import quantize_

gguf = pytest.importorskip("gguf")

TOKENS = torch.tensor([[1, 5, 9, 2, 15, 30, 36, 0], [3, 3, 3, 4, 4, 4, 5, 5]])


def model(**change):
    return small(rope_layout="interleaved", hidden_dim=96, **change)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_every_number_is_there(tmp_path, kind, tied):
    want = model(tie_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", want, kind)
    want = decoded(want, kind)
    loaded = from_pretrained(path, dtype=torch.float32)
    assert loaded.config == want.config.replace(rope_layout="half", eos_id=7)
    for name, p in loaded.named_parameters():
        if "q_proj" not in name and "k_proj" not in name:
            assert_same_bits(p.detach(), want.get_parameter(name).detach(), name)
    torch.testing.assert_close(loaded(TOKENS), want(TOKENS), rtol=0, atol=1e-6)
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {stored}


def test_scaled_frequencies(tmp_path):
    scaling = RopeScaling(32.0)
    want = model(rope_scaling=scaling, rope_theta=500000.0, max_seq_len=131072)
    loaded = from_pretrained(write_gguf(tmp_path / "m.gguf", want))
    assert loaded.config.rope_scaling == scaling
    positions = torch.arange(8) * 4000
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(loaded(TOKENS, positions=positions), want(TOKENS, positions=positions), **close)


def test_quantise_while_loading(tmp_path):
    write_gguf(tmp_path / "m.gguf", model(), "Q8_0")
    assert_same_model(from_pretrained(tmp_path, quantize="nf4"), quantize_(from_pretrained(tmp_path)))


def test_rows_are_decoded_some_at_a_time(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", model(), "Q4_0")
    whole = from_pretrained(tmp_path)
    monkeypatch.setattr("llamakern.checkpoint_gguf.CHUNK", 7 * 64)
    assert_same_model(from_pretrained(tmp_path), whole)


def test_a_mixture_of_k_quants(tmp_path):
    """llama.cpp's usual files: most matrices Q4_K, some Q6_K. The package cannot write these; random blocks do."""
    want = small(rope_layout="interleaved", dim=256, hidden_dim=256, head_dim=64)
    random, blocks = np.random.default_rng(0), {}
    for name, p in want.named_parameters():
        if p.dim() == 2:
            kind = gguf.GGMLQuantizationType["Q6_K" if "v_proj" in name or "down_proj" in name else "Q4_K"]
            size = gguf.GGML_QUANT_SIZES[kind][1]
            data = random.integers(0, 32, (p.shape[0], size), np.uint8)  # no byte of a float16 that is not finite
            blocks[name] = data, kind
            p.data = torch.from_numpy(gguf.quants.dequantize(data, kind))
    loaded = from_pretrained(write_gguf(tmp_path / "m.gguf", want, blocks=blocks))
    for name, p in loaded.named_parameters():
        if "q_proj" not in name and "k_proj" not in name:
            assert_same_bits(p.detach(), want.get_parameter(name).detach(), name)
    logits = want(TOKENS)
    torch.testing.assert_close(loaded(TOKENS), logits, rtol=0, atol=1e-5 * logits.abs().max().item())


def test_transformers_reads_the_same_numbers(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_gguf(tmp_path / "m.gguf", model(), "Q4_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(from_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)


METADATA = [
    ({"llama.expert_count": 8}, "must describe a dense LLaMA, got llama.expert_count: 8"),
    ({"llama.rope.scaling.type": "yarn"}, "got llama.rope.scaling.type: yarn"),
    ({"llama.attention.value_length": 8}, "got llama.attention.value_length: 8 where a head has 16"),
    ({"general.alignment": 0}, "must have a positive general.alignment, got 0"),
    ({"general.alignment": "x"}, "must have a positive general.alignment, got x"),
]


@pytest.mark.parametrize(("metadata", "message"), METADATA)
def test_other_models_are_refused(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", model(), metadata=metadata)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(path)


TENSORS = [
    ({"blk.0.attn_q.bias": [1.0] * 64}, r"got missing \[\], unexpected \[blk.0.attn_q.bias\]"),
    ({"rope_freqs.weight": [1.0, 9.0] + [9.0] * 6}, "rope_freqs.weight that are not those of LLaMA 3.1"),
    ({"rope_freqs.weight": [1.0]}, "rope_freqs.weight that are not those of LLaMA 3.1"),
    ({"rope_freqs.weight": [-1.0] * 8}, "rope_freqs.weight without positive numbers"),
]


@pytest.mark.parametrize(("tensors", "message"), TENSORS)
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    tensors = {key: torch.tensor(value).numpy() for key, value in tensors.items()}
    path = write_gguf(tmp_path / "m.gguf", model(), tensors=tensors)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(path)


@pytest.mark.parametrize("size", [0, 3, 4, 8, 20, 30, 100, 600, 1500, -20000, -1])
def test_truncated_files(tmp_path, size):
    path = write_gguf(tmp_path / "m.gguf", model())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"checkpoint: .*m.gguf must be (whole, got|a .gguf of)"):
        from_pretrained(path)


def head(*parts):
    return b"GGUF" + b"".join(struct.pack(f"<{p[0]}", p[1]) if isinstance(p, tuple) else p for p in parts)


def text(string):
    return struct.pack("<Q", len(string)) + string


EMBEDDING = text(b"token_embd.weight")
HEADERS = [
    (b"GGML" + bytes(28), "must be a .gguf of version 2 or 3, got b'GGML'"),
    (head(("I", 0x03000000), ("Q", 0), ("Q", 0)), "must be a .gguf of version 2 or 3, got b'GGUF', version 50331648"),
    (head(("I", 3), ("Q", 2**60), ("Q", 0)), f"too few for {2**60} entries"),
    (head(("I", 3), ("Q", 0), ("Q", 2**60)), f"too few for {2**60} entries"),
    (head(("I", 3), ("Q", 0), ("Q", 1), ("Q", 2**63), bytes(20)), "cut short in its header"),
    (head(("I", 3), ("Q", 0), ("Q", 1), text(b"a"), ("I", 13), bytes(20)), "known types and flat arrays, got type 13"),
    (head(("I", 3), ("Q", 0), ("Q", 1), text(b"a"), ("I", 9), ("I", 9), bytes(20)), "flat arrays, got type 9 of 9"),
    (head(("I", 3), ("Q", 0), ("Q", 1), text(b"a"), ("I", 9), ("I", 8), ("Q", 2**60)), "too few for"),
    (head(("I", 3), ("Q", 0), ("Q", 1), text(b"a"), ("I", 9), ("I", 12), ("Q", 2**60)), "too few for"),
    (head(("I", 3), ("Q", 1), ("Q", 0), EMBEDDING, ("I", 2**31), bytes(20)), "too few for"),
    (head(("I", 3), ("Q", 1), ("Q", 0), text(b"a"), ("I", 1), ("Q", 0), ("I", 0), ("Q", 0)), "must have rows of whole"),
    (head(("I", 3), ("Q", 1), ("Q", 0), text(b"a"), ("I", 1), ("Q", 3), ("I", 2), ("Q", 0)), "whole Q4_0 blocks, got"),
    (
        head(("I", 3), ("Q", 1), ("Q", 0), text(b"a"), ("I", 1), ("Q", 3), ("I", 99), ("Q", 0)),
        "a known type, got 99",
    ),
    (head(("I", 3), ("Q", 1), ("Q", 0), text(b"a"), ("I", 1), ("Q", 3), ("I", 0), ("Q", 2**63)), "too few bytes for a"),
    (head(("I", 3), ("Q", 0), ("Q", 0), bytes(9)), "must hold the tensors of a LLaMA, got none for token_embd.weight"),
]


@pytest.mark.parametrize(("data", "message"), HEADERS)
def test_damaged_headers(tmp_path, data, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(path)


def test_its_own_tokenizer_is_not_read(tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", model())
    assert main(["generate", str(path), "--prompt", "a"]) == 1
    assert "with --tokenizer (that inside a .gguf is not read)" in capsys.readouterr().err


def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", model())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package gguf .* `pip install llamakern\[gguf\]`"):
        from_pretrained(path)
