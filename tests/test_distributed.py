"""Two processes on one machine, by torchrun and gloo: they must train as one process does."""

import json
import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import distributed_jobs as jobs
import distributed_loops as loops
import pytest
import torch
from safetensors.torch import load_file

from llamakern import peft
from llamakern.runs import RunFolder
from llamakern.train import TrainConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "distributed_jobs.py"
PACKAGES = ("transformers", "peft", "accelerate")
TRANSFORMERS = "loops:transformers_trainer"
LOOPS = ["loops:fsdp2,example:fsdp2", "loops:tensor_parallel,example:tensor_parallel"]


def python(*words, timeout=600) -> subprocess.CompletedProcess:
    """Killed with all its children after `timeout` seconds: nothing here may hang."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, words)], env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(words, process.returncode, output)


def torchrun(*words) -> subprocess.CompletedProcess:
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words, timeout=120)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny):
    """The folder in which two processes have done every job, with what they printed in output.txt."""
    folder = tmp_path_factory.mktemp("two")
    pairs = dict.fromkeys(LOOPS, "0 0")
    pairs["wrapped"] = "0 0"
    if all(map(find_spec, PACKAGES)):
        pairs[TRANSFORMERS] = "0 0"
    for kind in jobs.KINDS:
        pairs[f"killed:{kind}"] = "-9 -9"
        names = [f"{name}:{kind}" for name in ("train", "resumed", "not_finite", "gate", "stray", "thin")]
        pairs[",".join([*names, f"finetune:{tiny}:{kind}"])] = "0 0"
    done = python(SCRIPT, folder, *pairs)
    for name, codes in pairs.items():
        if name not in LOOPS:
            assert f"{name} {codes}\n" in done.stdout, done.stdout
    (folder / "output.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny):
    """What one process makes of the jobs that are compared."""
    folder = tmp_path_factory.mktemp("one")
    for kind in jobs.KINDS:
        jobs.train(folder, kind)
        jobs.finetune(folder, str(tiny), kind)
    return folder


def column(folder, kind, name):
    return torch.tensor(
        [line[name] for line in RunFolder(folder / kind).history() if name in line], dtype=torch.float64
    )


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_two_processes_train_as_one(one, two, kind):
    for name in ("loss", "grad_norm", "eval_loss", "lr"):
        torch.testing.assert_close(column(two, kind, name), column(one, kind, name), rtol=2e-5, atol=0)
    assert torch.equal(column(two, kind, "tokens"), column(one, kind, "tokens"))
    results = [torch.load(folder / kind / "result.pt") for folder in (one, two)]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["trainable"] == results[1]["trainable"]
    assert len(RunFolder(two / kind).checkpoints()) == 2


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_the_adapter_file_is_that_of_one_process(one, two, kind):
    wanted, got = (load_file(folder / kind / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    config = [(folder / kind / "adapter" / "adapter_config.json").read_text() for folder in (one, two)]
    assert config[0] == config[1]


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_a_killed_job_ends_like_an_unbroken_one(two, kind):
    again, whole = (RunFolder(two / f"{kind}-{name}").load_checkpoint() for name in ("again", "whole"))
    assert again["progress"]["step"] == whole["progress"]["step"] == 8
    for name in whole["parameters"]:
        assert torch.equal(again["parameters"][name], whole["parameters"][name]), name
    for mine, theirs in zip(again["generators"], whole["generators"], strict=True):
        assert torch.equal(mine["cpu"], theirs["cpu"])
    assert torch.equal(column(two, f"{kind}-again", "loss"), column(two, f"{kind}-whole", "loss"))


def test_each_process_has_dropout_of_its_own(two):
    first, second = RunFolder(two / "ddp-whole").load_checkpoint()["generators"]
    assert not torch.equal(first["cpu"], second["cpu"])


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_a_nan_in_one_process_stops_all_and_keeps_the_last_good_state(two, kind):
    for rank in range(2):
        message = (two / f"{kind}-nan-{rank}.txt").read_text()
        assert "got loss nan at step 5; the state after step 4 is saved in" in message
    state = RunFolder(two / f"{kind}-nan").load_checkpoint()
    assert state["progress"]["step"] == 4
    assert all(torch.isfinite(p).all() for p in state["parameters"].values())


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_the_gate_sees_every_tensor(two, kind):
    for rank in range(2):
        message = (two / f"{kind}-gate-{rank}.txt").read_text()
        name = "layers.0.mlp.down_proj.lora_a"
        assert message.endswith(f"of zeros: {name}; no change: {name}"), message


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_the_gate_names_what_no_loss_reaches(two, kind):
    for rank in range(2):
        assert ": stray" in (two / f"{kind}-stray-{rank}.txt").read_text()


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_of_ones_own(two, loop):
    """FSDP2 and tensor parallelism without the trainer: the assertions stand in distributed_loops.py."""
    output = (two / "output.txt").read_text()
    assert f"{loop} 0 0\n" in output, output
    if "fsdp2" in loop:
        assert load_file(two / "fsdp2" / "adapter" / "adapter_model.safetensors")


def test_transformers_trainer(two, tmp_path):
    for package in PACKAGES:
        pytest.importorskip(package)
    loops.transformers_trainer(tmp_path)
    one, two = (torch.tensor(json.loads((folder / "transformers.json").read_text())) for folder in (tmp_path, two))
    assert one.shape == (4, 2)
    torch.testing.assert_close(two, one, rtol=2e-3, atol=0)  # transformers logs rounded losses


def test_another_number_of_processes_is_refused(two):
    with pytest.raises(
        ValueError, match=r"train: settings must equal those of the run in .*, got processes 1 in place of 2"
    ):
        jobs.make(two / "ddp", "ddp").train()


def test_parallel_must_be_known():
    with pytest.raises(ValueError, match=r"train: parallel must be one of \['ddp', 'fsdp2'\], got 'tp'"):
        TrainConfig(parallel="tp")


def test_a_rank_of_no_job_does_not_silence_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    peft.save(jobs.qlora(), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_finetune_in_two_processes_writes_what_one_writes(one, two, kind):
    folders = [folder / f"finetune-{kind}" for folder in (one, two)]
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    for name in ("loss_before", "loss_after"):
        assert math.isclose(runs[0]["result"][name], runs[1]["result"][name], rel_tol=1e-5)
    assert runs[0]["result"]["tokens"] == runs[1]["result"]["tokens"]
    assert runs[0]["hashes"].keys() == runs[1]["hashes"].keys()
    assert [len(RunFolder(folder).history()) for folder in folders] == [5, 5]


def test_torchrun_and_one_failing_process(tiny, tmp_path):
    """torchrun's own launch; then process 1 alone meets an error, which ends the job and is shown."""
    done = torchrun(SCRIPT, tmp_path, f"finetune:{tiny}:ddp,fails")
    assert done.stdout.count("adapter: ") == 1, done.stdout
    assert (tmp_path / "finetune-ddp" / "adapter").is_dir()
    assert done.returncode != 0
    assert "ValueError: process 1 has a reason of its own" in done.stdout
