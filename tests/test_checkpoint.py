import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from compare import assert_same_bits
from safetensors.torch import load_file, save_file
from torch import nn

from llamakern.checkpoint import from_pretrained, save_pretrained
from llamakern.checkpoint_nf4 import dynamic_map
from llamakern.config import LlamaConfig, RopeScaling
from llamakern.model import Llama
from llamakern.nn import NF4Linear, quantize_

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "change",
    [{}, {"tie_embeddings": True}, {"rope_scaling": RopeScaling(32.0), "head_dim": 20, "eos_id": (3, 4)}],
    ids=["plain", "tied", "scaled"],
)
def test_save_and_load(tmp_path, change, dtype):
    model = small(**change).to(dtype)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == ("tie_embeddings" not in change)
    loaded = Llama.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
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


def test_quantise_while_loading(tmp_path):
    model = small(tie_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, quantize="nf4")
    assert type(loaded.lm_head) is nn.Linear
    assert_same_model(loaded, quantize_(model))
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
    np = pytest.importorskip("numpy")
    want = np.load(data_dir / "vectors" / "nf4_bitsandbytes.npz")["dq_code256"]
    assert_same_bits(dynamic_map(), torch.from_numpy(want))


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
    (new_state(blocksize=0), "must be nf4 with nested blocks of 256"),
    (new_state(quant_type="fp4"), "must be nf4 with nested blocks of 256"),
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
    model.config = model.config.replace(tie_embeddings=False)
    model.save_pretrained(tmp_path)

    def move(tensors):
        for key in [k for k in tensors if k.startswith("lm_head")]:
            tensors["model.embed_tokens" + key.removeprefix("lm_head")] = tensors.pop(key)
        tensors["lm_head.weight"] = torch.zeros(37, 64)

    edit_tensors(tmp_path, move)
    with pytest.raises(ValueError, match=r"checkpoint: embed_tokens.weight must be dense, got a packed NF4 weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path, size):
    small().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"checkpoint: .*model.safetensors must be a whole safetensors file, got"):
        from_pretrained(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold config.json or one llama2.c .bin, got neither"):
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
    with pytest.raises(ValueError, match=r"path must be a folder or a llama2.c .bin file, got .*notes.txt"):
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


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="checkpoint: quantize must be None or 'nf4', got 'int8'"):
        from_pretrained(tmp_path, quantize="int8")
    with pytest.raises(ValueError, match="checkpoint: quantize must be 'nf4' with quantize_head, got None"):
        from_pretrained(tmp_path, quantize_head=True)


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


PEAK = """
import resource, sys
from llamakern.model import Llama
Llama.from_pretrained({start!r}, quantize="nf4")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Llama.from_pretrained({path!r}, quantize="nf4")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB only on Linux")
def test_peak_memory_of_quantising_while_loading(tmp_path):
    """128 MiB of dense blocks become 18 MiB; beside them stand the embedding and one tensor at a time."""
    config = SMALL.replace(dim=1024, n_layers=8, n_heads=16, n_kv_heads=16, hidden_dim=2816 // 4, vocab_size=64)
    model = Llama(config.replace(n_layers=1))
    model.save_pretrained(tmp_path / "start")
    model = Llama(config)
    dense = sum(p.nbytes for p in model.layers.parameters())
    largest = max(p.nbytes for p in model.layers.parameters())
    save_pretrained(model, tmp_path / "model", max_shard_bytes=dense // 3)
    code = PEAK.format(start=str(tmp_path / "start"), path=str(tmp_path / "model"))
    # glibc gives large blocks pages of their own, and gives them back; here "large" must begin below these few MiB.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert int(out) * 1024 < 0.15 * dense + 4 * largest + 8 * 2**20


def test_transformers_loads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(rope_scaling=RopeScaling(8.0, original_max_seq_len=8), head_dim=12)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, 37, (2, 16))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_model(from_pretrained(tmp_path / "theirs"), model)


@pytest.fixture
def bnb():
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name)
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_bitsandbytes_loads_what_is_saved(tmp_path, double_quant, bnb):
    from transformers import AutoModelForCausalLM

    model = quantize_(small(hidden_dim=128), double_quant=double_quant)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu")
    theirs.train()  # in eval mode bitsandbytes repacks its weights for a bfloat16 kernel
    tokens = torch.randint(0, 37, (2, 16))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_what_bitsandbytes_saved_loads(tmp_path, double_quant, bnb):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small().save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=how, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed")
    ours = from_pretrained(tmp_path / "packed")
    packed = {name: m for name, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert len(packed) == 14
    for name, linear in packed.items():
        weight = theirs.get_submodule(f"model.{name}").weight
        want = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        # bitsandbytes' CPU decoder is wrong where blocks cross rows.
        if linear.in_features % 64 == 0:
            assert_same_bits(linear.dequantize(torch.bfloat16), want, name)


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
