import json
import os
from pathlib import Path

import pytest
import torch
from compare import DEVICE, PRETENDED

import llamakern
from llamakern import _C, Llama, LlamaConfig
from llamakern.demo import train_tokenizer

for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    if (asked := Path(folder).resolve() / "llamakern").is_dir():
        if Path(llamakern.__file__).resolve().parent != asked:  # `python -m pytest` looks in the checkout first
            raise pytest.UsageError(
                f"PYTHONPATH asks for {asked}, but {llamakern.__file__} is found: call pytest itself"
            )
        break

if PRETENDED:
    from pretended_gpu import pretended

    GPU = pretended()  # for as long as this module lives
    GPU.__enter__()
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)  # before the test modules make their first tensor


@pytest.fixture(params=_C.supported_isas() if DEVICE == "cpu" else [DEVICE])
def isa(request):
    """Each instruction set that this machine has; one engine where the tests run on a GPU."""
    if DEVICE != "cpu":
        yield request.param
        return
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir():
    """Real checkpoints and expected values: LLAMAKERN_TEST_DATA, or shared/data beside the checkout."""
    place = Path(os.environ.get("LLAMAKERN_TEST_DATA", Path(__file__).parents[2] / "shared/data"))
    if not place.is_dir():
        pytest.skip(f"no test data at {place}; set LLAMAKERN_TEST_DATA")
    return place


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `base`, a random model and its sentencepiece tokenizer, and `tasks.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    texts = [f"{a} {b} and {b} {a}" for a in words for b in words]
    train_tokenizer(texts, 300, folder / "base" / "tokenizer.model")
    torch.manual_seed(0)
    config = LlamaConfig(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=64, vocab_size=300, max_seq_len=64)
    Llama(config).save_pretrained(folder / "base")
    tasks = [{"instruction": f"say {a}", "output": f"{a} {a}"} for a in words]
    (folder / "tasks.jsonl").write_text("\n".join(json.dumps(t) for t in tasks))
    return folder
