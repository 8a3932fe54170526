"""Resuming is exact: bit-equal parameters after a break at any step, and after SIGKILL at random moments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamakern import peft
from llamakern.config import LlamaConfig
from llamakern.data import Example
from llamakern.model import Llama
from llamakern.peft import LoRAConfig
from llamakern.runs import RunFolder
from llamakern.train import TrainConfig, Trainer

TINY = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=32)


def make(out, lora_seed=1, **config) -> Trainer:
    torch.manual_seed(0)
    model = Llama(TINY)
    torch.manual_seed(lora_seed)
    peft.apply(model, LoRAConfig(rank=4, dropout=0.3))
    rows = [[(i + t) % 32 for t in range(4 + i % 9)] for i in range(10)]
    examples = [Example(row, [False, *[True] * (len(row) - 1)], False, "") for row in rows]
    settings = {
        "batch_size": 3,
        "accumulation": 2,
        "max_len": 16,
        "steps": 24,
        "lr": 1e-2,
        "warmup": 3,
        "save_every": 4,
    }
    return Trainer(model, examples, TrainConfig(**settings | config), held_out=examples[:2], out=out, quiet=True)


class Break(Exception):
    pass


def broken_at(step: int, out) -> None:
    """Train, and stop in the middle of the given step."""
    trainer = make(out)
    backward, calls = trainer.backward, []

    def stop(batches):
        calls.append(1)
        if len(calls) == step:
            raise Break
        return backward(batches)

    trainer.backward = stop
    with pytest.raises(Break):
        trainer.train()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_clock(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def test_a_broken_run_ends_like_an_unbroken_one(tmp_path):
    whole = make(tmp_path / "whole")
    wanted = whole.train()
    for step in (1, 6):
        broken_at(step, tmp_path / "broken")
    again = make(tmp_path / "broken", lora_seed=9)  # another start: everything comes from the checkpoint
    result = again.train()
    assert same(whole.trainable, again.trainable)
    assert without_clock(whole.folder.history()) == without_clock(again.folder.history())
    assert {k: result[k] for k in ("loss_before", "loss_after", "steps", "tokens")} == {
        k: wanted[k] for k in ("loss_before", "loss_after", "steps", "tokens")
    }
    once_more = make(tmp_path / "broken")
    assert once_more.train()["loss_after"] == wanted["loss_after"]
    assert without_clock(whole.folder.history()) == without_clock(once_more.folder.history())


def test_the_gate_judges_the_start_of_a_run_only(tmp_path):
    """At the end of the cosine a step may be smaller than a parameter's last bit."""

    def slow(out):
        trainer = make(out, steps=12, save_every=10)
        trainer.config.lr_at = lambda step, total: 1e-2 if step <= 10 else 1e-30
        return trainer

    slow(tmp_path).train()
    trainer = slow(tmp_path)
    trainer.folder.checkpoints()[-1].unlink()  # back to step 10
    assert trainer.train()["steps"] == 12


def test_a_run_with_other_settings_is_refused(tmp_path):
    make(tmp_path, steps=2).train()
    with pytest.raises(
        ValueError, match=r"train: settings must equal those of the run in .*got lr 0.5 in place of 0.01"
    ):
        make(tmp_path, steps=2, lr=0.5).train()
    other = make(tmp_path, steps=2)
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="train: examples must be those of the run"):
        other.train()
    make(tmp_path, steps=2, save_every=1, keep_last=5).train()


def test_a_damaged_checkpoint_says_so(tmp_path):
    trainer = make(tmp_path, steps=1)
    trainer.train()
    path = trainer.folder.checkpoints()[-1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train: checkpoint must be a whole file, got .*step-00000001.pt"):
        make(tmp_path, steps=1).train()


# A parent that has loaded torch forks one child per attempt and kills it; so an attempt costs milliseconds.
ATTEMPTS = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from test_resume import RunFolder, make
random.seed(int(sys.argv[2]))
kills, STEPS = 0, 100
def reached():
    return max((int(p.stem[5:]) for p in RunFolder(sys.argv[1]).checkpoints()), default=0)
while True:
    child = os.fork()
    if child == 0:
        make(sys.argv[1], steps=STEPS, save_every=1).train()
        os._exit(0)
    # Some are killed as they start; the others after a few steps, however fast the machine is.
    deadline, target = time.monotonic() + random.uniform(0.02, 0.25), reached() + 3
    while kills < 20 and time.monotonic() < deadline and reached() < target:
        time.sleep(random.uniform(0.0, 0.002))
    if kills < 20:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        kills += 1
    elif kills < 20:
        sys.exit(f"ended after {{kills}} kills")
    else:
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_lose_nothing(tmp_path):
    script = ATTEMPTS.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a forked child has no thread pool
    root = Path(__file__).parents[1]
    for folder, code in (("killed", script), ("whole", script.replace("kills, STEPS = 0", "kills, STEPS = 20"))):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / folder), "7"], cwd=root, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    killed, whole = (RunFolder(tmp_path / folder).load_checkpoint() for folder in ("killed", "whole"))
    assert killed["progress"]["step"] == whole["progress"]["step"] == 100
    assert same(killed["parameters"], whole["parameters"])
