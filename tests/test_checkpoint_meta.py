"""Meta's folders: the same numbers as the model they were written from, whole or split as Meta splits."""

import json
import os
import zipfile

import pytest
import torch
from checkpoints import SMALL, assert_same_model, edit_pth, small, write_meta
from compare import assert_same_bits

from llamakern.checkpoint import from_pretrained
from llamakern.config import PRESETS, LlamaConfig, RopeScaling
from llamakern.nn import quantize_

TOKENS = torch.tensor([[1, 5, 9, 2, 15, 30, 36, 0], [3, 3, 3, 4, 4, 4, 5, 5]])


def meta(**change):
    return small(rope_layout="interleaved", hidden_dim=48, vocab_size=40, **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("shards", "embed_dim"), [(1, 1), (2, 1), (4, 0), (4, 1)], ids=["one", "two-llama2", "four-llama3", "four-llama2"]
)
def test_every_number_is_there(tmp_path, shards, embed_dim, dtype):
    model = meta(n_kv_heads=4).to(dtype)
    loaded = from_pretrained(write_meta(tmp_path, model, shards, embed_dim=embed_dim))
    assert loaded.config == model.config.replace(rope_layout="half", max_seq_len=4096)
    assert loaded.norm.weight.dtype == dtype
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=0, atol=bound)
    for name, p in loaded.named_parameters():
        want = model.get_parameter(name).detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rows 2i of a head come first, then rows 2i + 1
            heads = want.view(4, 16, -1)
            want = torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).view(want.shape)
        assert_same_bits(p.detach(), want, name)


def test_grouped_heads_scaled_rope_and_a_saved_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = meta(rope_scaling=RopeScaling(8.0), rope_theta=500000.0)
    given = {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 40, "max_seq_len": 16}
    loaded = from_pretrained(write_meta(tmp_path / "meta", model, 2, embed_dim=0, **given))
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [False, True], ids=["absent", "equal"])
def test_tied(tmp_path, head):
    model = meta(tie_embeddings=True)
    loaded = from_pretrained(write_meta(tmp_path, model, 2, embed_dim=0, head=head))
    assert loaded.config.tie_embeddings
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert_same_bits(loaded.embed_tokens.weight.detach(), model.embed_tokens.weight.detach(), "embedding")


def test_a_head_that_begins_like_the_embedding_is_its_own(tmp_path):
    model = meta()
    with torch.no_grad():
        model.lm_head.weight[0] = model.embed_tokens.weight[0]
    assert not from_pretrained(write_meta(tmp_path, model, 2, embed_dim=0)).config.tie_embeddings


def test_quantise_while_loading(tmp_path):
    write_meta(tmp_path, meta(), 2)
    for double_quant in (False, True):
        want = quantize_(from_pretrained(tmp_path), double_quant=double_quant)
        assert_same_model(from_pretrained(tmp_path, quantize="nf4", double_quant=double_quant), want)


# Of the published params.json: what they say, and whose configuration it is.
PUBLISHED = [
    ("llama-7b", {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}),
    ("llama2-7b", {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}),
    ("llama2-70b", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "n_kv_heads": 8}),
    ("llama3-8b", {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8, "rope_theta": 500000.0}),
    ("llama3.1-70b", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8, "use_scaled_rope": True}),
    ("llama3.1-405b", {"multiple_of": 4096, "ffn_dim_multiplier": 1.2, "n_kv_heads": 8, "use_scaled_rope": True}),
    ("llama3.2-1b", {"multiple_of": 256, "ffn_dim_multiplier": 1.5, "n_kv_heads": 8, "use_scaled_rope": True}),
    ("llama3.2-3b", {"multiple_of": 256, "ffn_dim_multiplier": 1.0, "n_kv_heads": 8, "use_scaled_rope": True}),
]


@pytest.mark.parametrize(("name", "given"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_published_parameters_give_the_published_configuration(tmp_path, name, given):
    from llamakern.checkpoint_meta import EMBED, GATE, configure

    want = LlamaConfig.preset(name)
    sizes = {key: PRESETS[name][key] for key in ("dim", "n_layers", "n_heads")}
    theta = {"rope_theta": 500000.0} if want.vocab_size > 32000 else {}
    shapes = {EMBED: (want.vocab_size, want.dim), GATE: (want.hidden_dim, want.dim)}
    assert configure(tmp_path, sizes | theta | given, shapes, want.tie_embeddings) == want


def test_scale_factors_of_the_file_are_used(tmp_path):
    given = {"use_scaled_rope": True, "rope_scaling_factor": 16, "rope_high_freq_factor": 1.0}
    loaded = from_pretrained(write_meta(tmp_path, meta(), **given))
    assert loaded.config.rope_scaling == RopeScaling(16, 1.0, 1.0)
    assert loaded.config.max_seq_len == 131072


WQ = "layers.0.attention.wq.weight"
TENSORS = [
    (lambda t: t.pop(WQ), r"must hold the same tensors, got layers.0.attention.wq.weight"),
    (lambda t: t.update({WQ: torch.ones(32, 65)}), r"wq.weight of .*01.pth must fit \[32, 64\] torch.float32 of .*00"),
    (lambda t: t.update({WQ: t[WQ].half()}), r"must fit .* got \[32, 64\] torch.float16"),
    (lambda t: t.update({WQ: t[WQ].int()}), r"wq.weight of .*01.pth must be of float32, .* got torch.int32"),
    (lambda t: t.update({WQ: torch.ones(64, 32).T}), r"must be a contiguous vector or matrix, got shape \[32, 64\]"),
    (lambda t: t.update({WQ: torch.ones(1).expand(10**9, 64)}), "must be a contiguous vector or matrix"),
    (lambda t: t.update({WQ: torch.ones(3, 3).to_sparse()}), "must hold dense tensors by name, got 'layers.0"),
    (lambda t: t.update(step=3), "must hold dense tensors by name, got 'step': int"),
    (lambda t: t.update({"a.b": torch.ones(2)}), "must hold the same tensors, got a.b"),
]


@pytest.mark.parametrize(("edit", "message"), TENSORS)
def test_wrong_tensors_are_named(tmp_path, edit, message):
    write_meta(tmp_path, meta(), 2)
    edit_pth(tmp_path / "consolidated.01.pth", edit)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(tmp_path)


def test_wrong_tensors_of_every_shard(tmp_path):
    write_meta(tmp_path, meta())
    edit_pth(tmp_path / "consolidated.00.pth", lambda t: t.update({"layers.0.attention.wqkv.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"got missing \[\], unexpected \[layers.0.attention.wqkv.weight\]"):
        from_pretrained(tmp_path)
    edit_pth(tmp_path / "consolidated.00.pth", lambda t: t.update({"layers.1.attention.wq.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"wq.weight of .*00.pth must be a matrix, got shape \[2\]"):
        from_pretrained(tmp_path)
    torch.save({"norm.weight": torch.ones(64)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"must hold the tensors of a LLaMA, got none for embed_tokens.weight"):
        from_pretrained(tmp_path)


PARAMS = [
    ({"dim": None}, "config: dim must be a positive integer, got None"),
    ({"n_layers": 3}, "got missing .*layers.2"),
    ({"n_layers": 10**9}, "must hold 1000000000 layers"),
    ({"n_heads": "4"}, "config: n_heads must be a positive integer, got '4'"),
    ({"vocab_size": 41}, r"embed_tokens.weight must have shape \[41, 64\], got \[40, 64\]"),
    ({"multiple_of": 32}, "feed_forward.w1 must have 192 rows by dim, multiple_of and ffn_dim_multiplier, got 48"),
    ({"multiple_of": "x"}, "params.json must describe a LLaMA, got"),
    ({"moe_args": {"num_experts": 16}}, "must hold a whole LLaMA 4, got no layers.0"),
    ({"use_scaled_rope": "false"}, "use_scaled_rope of .*params.json must be true or false, got 'false'"),
    ({"use_scaled_rope": True, "rope_scaling_factor": -1}, "config: factor must be a positive number, got -1"),
    (
        {"max_seq_len": 0},
        "params.json must describe a LLaMA, got config: max_seq_len must be a positive",
    ),
    ({"rope_theta": "big"}, "config: rope_theta must be a positive number, got 'big'"),
]


@pytest.mark.parametrize(("change", "message"), PARAMS)
def test_wrong_parameters_are_named(tmp_path, change, message):
    write_meta(tmp_path, meta(), **change)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    write_meta(tmp_path, meta(n_kv_heads=4), 4)
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold 4 shards, .*00.pth to consolidated.03.pth, got 3"):
        from_pretrained(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold consolidated.01.pth, got consolidated.02.pth"):
        from_pretrained(tmp_path)
    (tmp_path / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold params.json beside consolidated"):
        from_pretrained(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    for file in tmp_path.glob("*.pth"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold consolidated.00.pth, got"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2, 100, 5000, -20000, -1])
def test_truncated_files(tmp_path, size):
    write_meta(tmp_path, meta())
    file = tmp_path / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"checkpoint: .*consolidated.00.pth must be"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_files_zipped_again_are_refused(tmp_path, method):
    """Their numbers do not stand where torch would look for them."""
    write_meta(tmp_path, meta())
    file = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records:
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"tok_embeddings.weight of .* must stand where torch.save puts it"):
        from_pretrained(tmp_path)


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_pickle_runs_nothing(tmp_path, zipped):
    write_meta(tmp_path, meta())
    file = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": Malice(tmp_path / "ran")}, file, _use_new_zipfile_serialization=zipped)
    message = (
        "must hold plain tensors and no code, got GLOBAL posix.mkdir" if zipped else "must be a .pth in torch's zip"
    )
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_old_pickles_say_how_to_convert_them(tmp_path):
    write_meta(tmp_path, meta())
    file = tmp_path / "consolidated.00.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"must be a .pth in torch's zip format.*weights_only=True"):
        from_pretrained(tmp_path)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="must hold a dictionary of tensors, got list"):
        from_pretrained(tmp_path)


def test_hugging_face_comes_first(tmp_path):
    write_meta(tmp_path, meta())
    small().save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config == SMALL
    assert json.loads((tmp_path / "params.json").read_text())["dim"] == 64
