import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, assert_same_model, edit_config, edit_tensors, small
from compare import assert_same_bits
from safetensors.torch import load_file
from torch import nn

from llamakern.checkpoint import from_pretrained
from llamakern.checkpoint_save import save_pretrained
from llamakern.config import RopeScaling
from llamakern.model import Llama
from llamakern.nn import quantize_

FIXTURES = Path(__file__).parent / "fixtures"


LOGITS = json.loads((FIXTURES / "logits.json").read_text())


@pytest.mark.parametrize("name", LOGITS)
def test_every_format_loads_for_ever(name):
    """Files written once and never again: a model of one layer, and its logits after five tokens."""
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    model = from_pretrained(FIXTURES / name, dtype=torch.float32)
    logits = model(torch.tensor([[1, 5, 9, 2, 15]]))[0, -1]
    torch.testing.assert_close(logits, torch.tensor(LOGITS[name]), rtol=0, atol=1e-5)


def test_every_format_has_a_fixture():
    made = runpy.run_path(str(FIXTURES / "make.py"))["FIXTURES"]
    assert made.keys() == LOGITS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    "change",
    [{}, {"tie_embeddings": True}, {"rope_scaling": RopeScaling(32.0), "head_dim": 20, "eos_id": (3, 4)}],
    ids=["plain", "tied", "scaled"],
)
def test_save_and_load(tmp_path, change, dtype):
    model = small(**change).to(dtype)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # who may read one may read all
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == ("tie_embeddings" not in change)
    loaded = Llama.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert_same_bits(loaded(torch.tensor([[1, 2, 3]])).detach(), model(torch.tensor([[1, 2, 3]])).detach(), "logits")
    assert all(p.requires_grad for p in loaded.parameters())


def test_shards(tmp_path):
    model = small()
    save_pretrained(model, tmp_path, max_shard_bytes=30_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_model(from_pretrained(tmp_path), model)
    save_pretrained(model, tmp_path)  # leaves none of the shards behind
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    save_pretrained(model, tmp_path, max_shard_bytes=30_000)
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"must hold every shard of its index, got no {files[1]}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_whichever_is_stored(tmp_path, stored):
    model = small(tie_embeddings=True)
    model.save_pretrained(tmp_path)

    def edit(tensors):
        embed = tensors.pop("model.embed_tokens.weight")
        names = ("lm_head.weight", "model.embed_tokens.weight") if stored == "both" else (stored,)
        tensors.update({name: embed.clone() for name in names})

    edit_tensors(tmp_path, edit)
    loaded = from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_tied_but_different(tmp_path):
    small().save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight must equal embed_tokens.weight in a tied model"):
        from_pretrained(tmp_path)


def test_dtype_is_asked_for_or_configured_or_stored(tmp_path):
    small().save_pretrained(tmp_path)
    assert from_pretrained(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    edit_config(tmp_path, dtype="bfloat16")
    assert from_pretrained(tmp_path).norm.weight.dtype == torch.bfloat16
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    assert from_pretrained(tmp_path).norm.weight.dtype == torch.float32


def test_derived_frequencies_are_dropped(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert_same_model(from_pretrained(tmp_path), model)


def test_interleaved_model_is_saved_with_its_rows_reordered(tmp_path):
    model = small(rope_layout="interleaved")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.rope_layout == "half"
    tokens = torch.randint(0, 37, (2, 9))
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="checkpoint: rope_layout must be 'half' to save an NF4 model"):
        quantize_(model).save_pretrained(tmp_path)


def test_a_model_with_other_modules_is_not_saved(tmp_path):
    model = small()
    model.layers[0].mlp.up_proj = nn.Sequential(model.layers[0].mlp.up_proj)
    with pytest.raises(
        ValueError, match=r"missing \[layers.0.mlp.up_proj.weight\], unexpected \[layers.0.mlp.up_proj.0"
    ):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


DAMAGE = [
    (lambda t: t.pop("model.norm.weight"), r"got missing \[norm.weight\], unexpected \[\]"),
    (lambda t: t.update(other=torch.ones(1)), r"got missing \[\], unexpected \[other\]"),
    (
        lambda t: t.update({"norm.weight": torch.ones(64)}),
        "must hold norm.weight once, got it with and without `model.`",
    ),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(65)}),
        r"norm.weight must have shape \[64\], got \[65\]",
    ),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        "norm.weight must be of float32, bfloat16, float16, got torch.int8",
    ),
]


@pytest.mark.parametrize(("edit", "message"), DAMAGE)
def test_wrong_tensors_are_named(tmp_path, edit, message):
    small().save_pretrained(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path, size):
    small().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"checkpoint: .*model.safetensors must be a whole safetensors file, got"):
        from_pretrained(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a Hugging Face folder \(config.json .*, got .* an empty folder"):
        from_pretrained(tmp_path)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"a Meta folder .* or a llama2.c .bin, got .* with a.bin, b.bin"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON, got"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, got list"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(
        FileNotFoundError, match=r"must hold model.safetensors or model.safetensors.index.json, got neither"
    ):
        from_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"quant_method of .* must be 'bitsandbytes', got 'gptq'"):
        from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"path must be a Hugging Face folder .* got .*notes.txt"):
        from_pretrained(tmp_path / "notes.txt")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "nested/a.safetensors"])
def test_an_index_cannot_point_outside(tmp_path, file):
    folder = tmp_path / "model"
    small().save_pretrained(folder)
    (folder / "nested").mkdir()
    for place in (tmp_path / "secret.safetensors", folder / "nested" / "a.safetensors"):
        shutil.copy(folder / "model.safetensors", place)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(FileNotFoundError, match="must hold every shard of its index, got no"):
        from_pretrained(folder)


def test_a_configuration_cannot_ask_for_more_layers_than_there_are_tensors(tmp_path):
    small().save_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="must hold 1000000000 layers, got 21 tensors"):
        from_pretrained(tmp_path)


def test_bad_index(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    for index in ({}, {"weight_map": {"model.norm.weight": ["a"]}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"weight_map of .*index.json must name files, got"):
            from_pretrained(tmp_path)


def test_saving_leaves_other_files_alone(tmp_path):
    (tmp_path / "model_of_mine.safetensors").write_bytes(b"mine")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "model_of_mine.safetensors").read_bytes() == b"mine"


def kill_after(n, folder, model, max_shard_bytes):
    """Saves in a forked process that dies, as from a kill, before its n-th change of the folder; whether it did."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(n))

        def mortal(change):
            def run(*arguments, **keywords):
                if next(left, None) is None:
                    os._exit(9)
                return change(*arguments, **keywords)

            return run

        Path.unlink, Path.mkdir, os.replace = mortal(Path.unlink), mortal(Path.mkdir), mortal(os.replace)
        save_pretrained(model, folder, max_shard_bytes=max_shard_bytes)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("old_bytes", [60_000, 10**9], ids=["shards", "whole"])
def test_a_kill_while_saving_leaves_the_old_model_or_the_new_or_none(tmp_path, old_bytes, monkeypatch):
    """The two models differ in a number that only config.json holds, so that a mixture would load unnoticed."""
    old, new = small(), small(rope_theta=5e5)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and no part of what is looked at
    n, died, seen = 0, True, []
    while died:
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(b"mine")
        save_pretrained(old, folder, max_shard_bytes=old_bytes)
        died = kill_after(n, folder, new, 60_000)
        assert (folder / "tokenizer.model").read_bytes() == b"mine"
        try:
            loaded = from_pretrained(folder)
        except FileNotFoundError:
            seen.append("none")
        else:
            seen.append("old" if loaded.config == old.config else "new")
            assert_same_model(loaded, old if seen[-1] == "old" else new)
        save_pretrained(new, folder)  # and what was left is no hindrance
        assert_same_model(from_pretrained(folder), new)
        assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
        n += 1
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert sorted(seen, key=["old", "none", "new"].index) == seen


def test_new_weights_of_the_same_configuration_take_their_place_in_one_rename(tmp_path):
    old, new, n, died = small(), small(), 0, True
    old.save_pretrained(tmp_path)
    while died:
        died = kill_after(n, tmp_path, new, 10**9)
        n += 1
        loaded = from_pretrained(tmp_path)  # there is always one
        assert any(torch.equal(loaded.lm_head.weight, m.lm_head.weight) for m in (old, new))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="checkpoint: quantize must be None or 'nf4', got 'int8'"):
        from_pretrained(tmp_path, quantize="int8")
    for name in ("quantize_head", "double_quant"):
        with pytest.raises(ValueError, match=f"checkpoint: quantize must be 'nf4' with {name}, got None"):
            from_pretrained(tmp_path, **{name: True})
    for dtype in (torch.int8, torch.float64, "bfloat16"):
        with pytest.raises(TypeError, match=f"checkpoint: dtype must be None or torch's float32, .*, got '?{dtype}"):
            from_pretrained(tmp_path, dtype=dtype)


def test_names_in_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as e:
        from_pretrained("meta-llama/Llama-3.2-1B")
    assert "`hf download meta-llama/Llama-3.2-1B`" in str(e.value)
    assert "licence at https://huggingface.co/meta-llama/Llama-3.2-1B" in str(e.value)
    with pytest.raises(FileNotFoundError, match=r"checkpoint: path must be a folder or a file, got './nothing/here'"):
        from_pretrained("./nothing/here")
    model, repo = small(), tmp_path / "models--some--model"
    model.save_pretrained(repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    assert_same_model(from_pretrained("some/model"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": RopeScaling(8.0, original_max_seq_len=8), "head_dim": 12},
        {"tie_embeddings": True},
        {"rope_layout": "interleaved", "n_kv_heads": 4},
    ],
    ids=["scaled", "tied", "interleaved"],
)
def test_transformers_loads_what_is_saved(tmp_path, change, dtype):
    transformers = pytest.importorskip("transformers")
    model = small(**change).to(dtype)
    save_pretrained(model, tmp_path, max_shard_bytes=20_000 if "tie_embeddings" in change else 10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype == dtype
    loaded = from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        assert_same_bits(
            p.detach(), theirs.get_parameter(name if "lm_head" in name else f"model.{name}").detach(), name
        )
    tokens = torch.randint(0, 37, (2, 16))
    with torch.inference_mode():
        want = theirs.float()(tokens).logits
        torch.testing.assert_close(model.float()(tokens), want, rtol=0, atol=1e-5)
    theirs.to(dtype).save_pretrained(tmp_path / "theirs")
    assert_same_model(from_pretrained(tmp_path / "theirs"), loaded)
