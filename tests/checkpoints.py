"""What the checkpoint tests share: a small model, and ways to damage the folder it is saved in."""

import json

from compare import assert_same_bits
from safetensors.torch import load_file, save_file

from llamakern.config import LlamaConfig
from llamakern.model import Llama

SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=44, vocab_size=37, max_seq_len=16)


def small(**change):
    return Llama(SMALL.replace(**change))


def assert_same_model(a, b):
    assert a.config == b.config
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert_same_bits(p.detach().reshape(-1), q.detach().reshape(-1), name)


def edit_config(folder, **change):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
