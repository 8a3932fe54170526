"""What test_distributed.py runs in two processes: `distributed_jobs.py <folder> <job>,<job>,... <job>,...`

Each list is one pair of processes, forked from one that has loaded all of torch that they need, which saves seconds;
their environment is torchrun's. Under torchrun itself the jobs run in the process as it is. A job is a function below
with its arguments, `train:ddp`, and writes into the folder.
"""

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp

from llamakern import peft
from llamakern.config import LlamaConfig
from llamakern.data import Example
from llamakern.gate import GateError
from llamakern.model import Llama
from llamakern.nn import quantize_
from llamakern.train import TrainConfig, Trainer

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=32)
BASE = {"batch_size": 3, "accumulation": 2, "max_len": 16, "steps": 8, "lr": 1e-2, "warmup": 2, "save_every": 3}
KINDS = {"ddp": {"parallel": "ddp"}, "fsdp2": {"parallel": "fsdp2", "packing": False}}


def examples(n=13) -> list[Example]:
    """Of very different lengths, so that the processes' shares hold different numbers of trained tokens."""
    rows = [[(i * 7 + t * t) % 32 for t in range(4 + i % 9)] for i in range(n)]
    prompts = [1 + i % 3 for i in range(n)]
    return [Example(r, [False] * p + [True] * (len(r) - p), False, "") for r, p in zip(rows, prompts, strict=True)]


def qlora(dropout=0.0, rank=4, **knobs) -> Llama:
    torch.manual_seed(1)
    return peft.apply(quantize_(Llama(TINY), **knobs), peft.LoRAConfig(rank=rank, dropout=dropout))


def make(out, kind, dropout=0.0, **config) -> Trainer:
    model = qlora(dropout, double_quant=kind == "fsdp2")
    settings = TrainConfig(**BASE | KINDS[kind] | config)
    return Trainer(model, examples(), settings, held_out=examples(4), out=out, quiet=True)


def train(folder: Path, kind: str) -> None:
    """A whole run: its metrics, its adapter, and what `train` returned."""
    trainer = make(folder / kind, kind)
    result = trainer.train()
    peft.save(trainer.model, folder / kind / "adapter")
    if trainer.world.is_main:
        torch.save(result, folder / kind / "result.pt")


def wrapped(folder: Path) -> None:
    """DDP gives every process the adapter of process 0 and sends nothing of the frozen base."""
    rank, model = int(os.environ["RANK"]), qlora()
    linear = model.layers[0].mlp.up_proj
    linear.base.weight[0, 0], linear.lora_a.data[0, 0] = 7 + rank, 7.0 + rank
    Trainer(model, examples(), TrainConfig(**BASE), quiet=True)
    assert linear.base.weight[0, 0] == 7 + rank
    assert linear.lora_a[0, 0] == 7


def killed(folder: Path, kind: str) -> None:
    """Both processes die by SIGKILL in their sixth step."""
    trainer = make(folder / f"{kind}-again", kind, dropout=0.3)
    backward, steps = trainer.backward, []

    def die(batches):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(batches)

    trainer.backward = die
    trainer.train()


def resumed(folder: Path, kind: str) -> None:
    """Goes on where `killed` fell, and beside it a run that never broke; with dropout, which differs by process."""
    for name in ("again", "whole"):
        make(folder / f"{kind}-{name}", kind, dropout=0.3).train()


def fails(folder: Path) -> None:
    """Process 1 alone meets an error in its third step."""
    trainer = make(folder / "fails", "ddp")
    backward, steps = trainer.backward, []

    def fail(batches):
        steps.append(1)
        if len(steps) == 3 and trainer.world.rank == 1:
            raise ValueError("process 1 has a reason of its own")
        return backward(batches)

    trainer.backward = fail
    trainer.train()


def not_finite(folder: Path, kind: str) -> None:
    """One process's loss is NaN at step 4: every process must stop and the state after step 3 be kept."""
    trainer = make(folder / f"{kind}-nan", kind)
    loss, calls = trainer.loss, []

    def broken(batch):
        calls.append(1)
        return loss(batch) * (float("nan") if len(calls) > 8 and trainer.world.rank == trainer.world.size - 1 else 1)

    trainer.evaluate = lambda: None
    trainer.loss = broken
    try:
        trainer.train()
    except FloatingPointError as error:
        (folder / f"{kind}-nan-{trainer.world.rank}.txt").write_text(str(error))


def thin(folder: Path, kind: str) -> None:
    """With rank 1 process 1 has no row of A, and so no gradient of it: the gate must ask both."""
    Trainer(qlora(rank=1), examples(), TrainConfig(**BASE | {"parallel": kind}), quiet=True).train()


def finetune(folder: Path, base: str, kind: str) -> None:
    """The command line's job."""
    from llamakern.cli import main

    words = [f"base={base}/base", f"data={base}/tasks.jsonl", "method=qlora", "template=plain", "steps=3"]
    words += ["batch_size=4", "max_len=64", "dropout=0", "eval_fraction=0.25", f"parallel={kind}"]
    if code := main(["finetune", *words, f"out={folder / 'finetune'}-{kind}"]):
        raise SystemExit(code)


def gate(folder: Path, kind: str) -> None:
    """A frozen B gives its A no gradient: the gate must name it in every process."""
    model = qlora()
    model.layers[0].mlp.down_proj.lora_b.requires_grad_(False)
    refused(folder, kind, "gate", model)


def stray(folder: Path, kind: str) -> None:
    """A parameter that no loss reaches: the gate must name it, before DDP gives up on it."""
    model = qlora()
    model.stray = torch.nn.Parameter(torch.ones(4))
    refused(folder, kind, "stray", model)


def refused(folder: Path, kind: str, name: str, model: Llama) -> None:
    trainer = Trainer(model, examples(), TrainConfig(**BASE | {"parallel": kind}), quiet=True)
    try:
        trainer.train()
    except GateError as error:
        (folder / f"{kind}-{name}-{trainer.world.rank}.txt").write_text(str(error))


def do(folder: Path, jobs: str) -> None:
    for job in jobs.split(","):
        name, *arguments = job.split(":")
        globals()[name](folder, *arguments)


def loops(folder: Path, name: str) -> None:
    """A job of distributed_loops.py."""
    import distributed_loops

    getattr(distributed_loops, name)(folder)


def example(folder: Path, name: str) -> None:
    """A script of examples/, twice: what its second start does after the checkpoint of the first must be the same."""
    main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"))["main"]
    arguments = [folder / name] if name == "fsdp2" else []
    first, second = main(*arguments), main(*arguments)
    assert first[-1] < first[0] - 0.5, first
    assert second == (first[4:] if arguments else first), (first, second)


def pair(folder: Path, jobs: str) -> list[int]:
    """The jobs in two new processes; their exit codes, negative where a signal ended one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(120)  # the end of a process that hangs
            os.environ |= agent | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "TORCHELASTIC_RUN_ID": "tests",
            }
            try:
                do(folder, jobs)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "loops:transformers_trainer" in sys.argv:
        import test_trainers  # noqa: F401  which loads transformers, for both processes
    for jobs in sys.argv[2:]:
        if dist.is_torchelastic_launched():
            do(Path(sys.argv[1]), jobs)
        else:
            print(jobs, *pair(Path(sys.argv[1]), jobs), flush=True)
