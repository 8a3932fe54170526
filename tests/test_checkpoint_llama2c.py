import shutil
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_model

from llamakern.checkpoint import from_pretrained
from llamakern.cli import main


def test_llama2c(data_dir):
    folder = data_dir / "stories260K"
    model = from_pretrained(folder)
    c = model.config
    assert (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size) == (64, 172, 5, 8, 4, 512)
    assert (c.tie_embeddings, c.rope_layout, c.max_seq_len) == (True, "half", 512)
    assert_same_model(from_pretrained(folder / "stories260K.bin"), model)


def llama2c_file(path, *, shared, size=None):
    """A file of dim 8, 1 layer, 2 heads, 1 key/value head: its tensors are filled in order with 0, 1, 2, ..."""
    dim, hidden, heads, kv_heads, vocab, seq_len = 8, 6, 2, 1, 10, 3
    kv = dim // heads * kv_heads
    shapes = [(vocab, dim), (dim,), (dim, dim), (kv, dim), (kv, dim), (dim, dim), (dim,), (hidden, dim), (dim, hidden)]
    shapes += [(hidden, dim), (dim,), (seq_len, 2), (seq_len, 2)] + ([] if shared else [(vocab, dim)])
    tensors = [torch.full(shape, float(i)) for i, shape in enumerate(shapes)]
    header = struct.pack("<7i", dim, hidden, 1, heads, kv_heads, vocab if shared else -vocab, seq_len)
    data = header + b"".join(t.numpy().tobytes() for t in tensors)
    path.write_bytes(data[:size])
    return path


@pytest.mark.parametrize("shared", [True, False])
def test_llama2c_order(tmp_path, shared):
    model = from_pretrained(llama2c_file(tmp_path / "m.bin", shared=shared))
    block = model.layers[0]
    order = [
        model.embed_tokens, block.input_layernorm, block.self_attn.q_proj, block.self_attn.k_proj,
        block.self_attn.v_proj, block.self_attn.o_proj, block.post_attention_layernorm, block.mlp.gate_proj,
        block.mlp.down_proj, block.mlp.up_proj, model.norm,
    ]  # fmt: skip
    assert [m.weight.unique().item() for m in order] == list(range(11))
    assert model.lm_head.weight.unique().item() == (0 if shared else 13)
    assert model.config.tie_embeddings == shared


def test_the_tokenizer_stands_beside_the_file(tmp_path, capsys):
    fixtures = Path(__file__).parent / "fixtures"
    shutil.copy(fixtures / "llama2c.bin", tmp_path)
    command = ["generate", str(tmp_path / "llama2c.bin"), "--prompt", "a", "--max-new-tokens", "1"]
    assert main(command) == 1
    assert f"{tmp_path} must hold one of tokenizer.json" in (error := capsys.readouterr().err)
    assert "with --tokenizer" in error
    shutil.copy(fixtures / "tokenizer.model", tmp_path)
    assert main(["quantize", command[1], str(tmp_path / "nf4")]) == 0
    assert {file.name for file in (tmp_path / "nf4").iterdir()} >= {"config.json", "tokenizer.model"}
    assert main(command) == 0


def test_bad_llama2c(tmp_path):
    path = tmp_path / "m.bin"
    size = llama2c_file(path, shared=True).stat().st_size
    for cut in (size - 1, 40):
        with pytest.raises(ValueError, match=f"must have {size} bytes as its header says, got {cut}"):
            from_pretrained(llama2c_file(path, shared=True, size=cut))
    with pytest.raises(ValueError, match="must begin with 7 int32, got 20 bytes"):
        from_pretrained(llama2c_file(path, shared=True, size=20))
    path.write_bytes(struct.pack("<7i", 8, 6, 1, 3, 1, 10, 3))
    with pytest.raises(ValueError, match=r"must be a llama2.c file, got a header with config: dim must be divisible"):
        from_pretrained(path)
    path.write_bytes(struct.pack("<7i", 0x616B3432, 1, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"must be a legacy \(version 0\) llama2.c file, got version 1"):
        from_pretrained(path)
    path.write_bytes(struct.pack("<7i", 2**30, 2**30, 2**30, 2**10, 2**10, 2**30, 2**30))
    with pytest.raises(ValueError, match="bytes as its header says, got 28"):
        from_pretrained(path)
