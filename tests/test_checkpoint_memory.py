"""Loading holds at most the result and the largest tensor, whatever the format: measured in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from checkpoints import SMALL, write_gguf, write_llama2c, write_meta

from llamakern.checkpoint_save import save_pretrained
from llamakern.model import Llama
from llamakern.nn import quantize_

# Linux lets a process lower its peak (VmHWM) to what it holds, so that one process can measure load after load.
LOADS = """
import gc, json, sys
from pathlib import Path
from llamakern.model import Llama

def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

peaks = []
starts, loads = json.loads(sys.argv[1])
for path in starts:
    Llama.from_pretrained(path, quantize="nf4")  # for what is loaded once and stays
for path, quantize in loads:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    model = Llama.from_pretrained(path, quantize=quantize)
    result = sum(p.untyped_storage().nbytes() for p in model.parameters())
    del model
    peaks.append((held("VmHWM") - before, result))
print(json.dumps(peaks))
"""
# glibc gives large blocks pages of their own, and gives them back; here "large" must begin below these few MiB.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WIDE = {"dim": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64, "hidden_dim": 2816}
CONFIG = SMALL.replace(n_layers=1, rope_layout="interleaved", **WIDE)


def write_all(folder, model):
    """The model, whose rope_layout is "interleaved", in every format."""
    write_meta(folder / "meta", model)
    write_meta(folder / "meta-shards", model, 4)
    write_llama2c(folder / "llama2c.bin", model)
    if find_spec("gguf"):
        write_gguf(folder / "f32.gguf", model)
        write_gguf(folder / "q8.gguf", model, "Q8_0")
    model.config = model.config.replace(rope_layout="half")
    save_pretrained(model, folder / "hf", max_shard_bytes=20_000_000)
    quantize_(model, double_quant=True).save_pretrained(folder / "bnb")
    return sorted(folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process lower its peak")
def test_loading_holds_the_result_and_one_tensor(tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "model").mkdir()
    starts = write_all(tmp_path / "start", Llama(CONFIG.replace(hidden_dim=64)))
    paths = write_all(tmp_path / "model", Llama(CONFIG))
    loads = [(str(path), quantize) for quantize in (None, "nf4") for path in paths]
    command = [sys.executable, "-c", LOADS, json.dumps([[str(path) for path in starts], loads])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    assert done.returncode == 0, done.stderr
    largest = 4 * CONFIG.dim * CONFIG.hidden_dim
    for (path, quantize), (peak, result) in zip(loads, json.loads(done.stdout), strict=True):
        one = largest // 8 if path.endswith("bnb") else largest
        extra = (peak - result) / one
        print(f"{path}, {quantize}: {peak / 2**20:.1f} MiB = {result / 2**20:.1f} MiB + {extra:.2f} tensors")
        assert peak > result * 0.5, path  # the measure itself works
        assert peak < result + one + 2 * 2**20, path
