"""The trainer: one flat loop. load a batch, forward, backward, clip, step, log; evaluate and save now and then.

A step is one optimizer update over `accumulation` batches, its loss the mean over all their trained tokens, so that
accumulating equals one large batch. The batches are a function of seed and epoch, the learning rate one of the step, so
a checkpoint needs the parameters, the optimizer, the generators and the step: resuming is exact to the last bit.

Under torchrun every process runs this loop on its share of each batch (`llamakern.distributed`); process 0 writes.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import torch
from torch import nn

from llamakern import distributed
from llamakern.data import Batch, Example, check_examples, epoch_batches, pack, pad
from llamakern.gate import STEPS, Gate
from llamakern.peft.base import trainable
from llamakern.progress import Progress
from llamakern.runs import RunFolder, peak_memory_mb, plot_curves, rng_state, set_rng_state


@dataclass
class TrainConfig:
    """Everything that the loop wants to know. ValueError for what cannot be."""

    epochs: int = 3
    steps: int | None = None  # in place of epochs
    batch_size: int = 8  # sequences in one forward pass, of all processes together
    accumulation: int = 1  # forward passes in one step
    max_len: int = 512  # tokens of one sequence, at most
    packing: bool = True  # whole sequences side by side, each seeing only itself, in place of padding
    lr: float = 3e-4
    warmup: int = 10  # steps of linear warm-up; a cosine to min_lr follows
    min_lr: float = 0.0
    weight_decay: float = 0.0  # matrices only
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    checkpoint_activations: bool = False
    parallel: str = "ddp"  # or fsdp2: what several processes share the work by
    eval_every: int = 0  # steps; 0: before the first and after the last
    save_every: int = 100
    keep_last: int = 2  # checkpoints
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "steps", "batch_size", "accumulation", "save_every", "keep_last"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "eval_every", "lr", "min_lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train: {name} must be finite and at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.parallel not in distributed.KINDS:
            raise ValueError(f"train: parallel must be one of {list(distributed.KINDS)}, got {self.parallel!r}")
        if self.max_len < 2:
            raise ValueError(f"train: max_len must be at least 2, got {self.max_len}")

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 1, 2, ..., total: linear up to `lr`, then a cosine down towards `min_lr`."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        done = (step - 1 - self.warmup) / max(1, total - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


PACK_TO = 64  # a packed row's length is a multiple of this, so that few shapes occur
PROGRESS = {"step": int, "tokens": int, "seconds": float, "loss_before": float | None}
# What comes up where something in a checkpoint is not of the kind or size that it was saved with.
DAMAGE = (LookupError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError)
FREE_TO_CHANGE = ("eval_every", "save_every", "keep_last")  # the others decide where a run goes


class OtherRun(ValueError):
    """A checkpoint that this run cannot continue."""


class Trainer:
    """Trains every parameter of `model` that requires a gradient. Under torchrun every process makes one, on one model.

    model: offers loss(tokens, labels, *, positions, cu_seqlens, reduction), as `Llama` does.
    train, held_out: examples of `llamakern.data`.
    out: folder for metrics.jsonl, loss.png and checkpoints; a run found there is continued. None: nothing is written.
    plot: whether there is to be a loss.png.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Example],
        config: TrainConfig | None = None,
        *,
        held_out: Sequence[Example] = (),
        out: str | Path | None = None,
        pad_id: int = 0,
        label: str = "train",
        quiet: bool = False,
        plot: bool = True,
    ):
        self.model, self.examples, self.held_out = model, list(train), list(held_out)
        self.config = config or TrainConfig()
        self.folder = None if out is None else RunFolder(out, self.config.keep_last)
        if not trainable(model):
            raise ValueError("train: model must have a trainable parameter, got none")
        if not self.examples:
            raise ValueError("train: train must hold at least one example, got none")
        check_examples(self.examples + self.held_out)
        self.fingerprint = fingerprint(self.examples)
        self.device = next(iter(trainable(model).values())).device
        self.world = distributed.join(self.device)
        self.pad_id, self.label, self.quiet, self.plot = pad_id, label, quiet or not self.world.is_main, plot
        self.parallel = distributed.wrap(model, self.config.parallel, self.world)
        self.trainable = trainable(model)  # after the wrapping, which may replace parameters by shards of them
        self.optimizer = self.make_optimizer()
        self.total = self.config.steps or sum(len(list(self.epoch(e))) for e in range(self.config.epochs))

    def train(self) -> dict:
        """Run to the end and return the figures of the run: loss_before and loss_after (held out), tokens_per_s, ...

        FloatingPointError for a loss or gradient that is not finite, after saving the last good state. GateError
        from the gate. ValueError if the folder holds a run with other settings or data.
        """
        config = self.config
        torch.manual_seed(config.seed + 1_000_003 * self.world.rank)  # dropout of its own in each process
        self.model.checkpoint_activations = config.checkpoint_activations
        progress = {"step": 0, "tokens": 0, "seconds": 0.0, "loss_before": None}
        if not self.resume(progress):
            self.forget()
            progress["loss_before"] = self.evaluate()
            self.log(step=0, eval_loss=progress["loss_before"])
            self.save(progress, rng_state())
        gate = Gate(self.trainable) if progress["step"] < STEPS else None  # it has judged before
        bar = Progress(self.total, self.label, start=progress["step"], quiet=self.quiet)
        self.model.train()
        for step, batches in enumerate(self.plan(progress["step"]), progress["step"] + 1):
            started, generators = time.perf_counter(), rng_state()
            lr = config.lr_at(step, self.total)
            loss = self.backward(batches)
            if gate and (unused := distributed.unused(self.parallel, self.trainable)):
                gate.finish({"no gradient": unused})
            grad_norm = nn.utils.clip_grad_norm_(self.trainable.values(), config.clip or math.inf)
            grad_norm = distributed.whole(grad_norm).item()
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                self.save(progress, generators)
                bar.close()
                raise FloatingPointError(self.describe_failure(step, loss, grad_norm))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if lr > 0 and gate:
                gate.observe()
            self.optimizer.zero_grad(set_to_none=True)
            tokens = int(self.world.sum(sum(batch.n_tokens for batch in batches)))
            seconds = time.perf_counter() - started
            progress["step"], progress["tokens"] = step, progress["tokens"] + tokens
            progress["seconds"] += seconds
            bar.update(loss, tokens / seconds)
            self.log(step=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens=tokens, tokens_per_s=tokens / seconds)
            if config.eval_every and step % config.eval_every == 0 and step < self.total:
                self.log(step=step, eval_loss=self.evaluate())
            if step % config.save_every == 0 or step == self.total:
                self.save(progress, rng_state())
        if gate:
            gate.close()
        bar.close()
        return self.finish(progress)

    def backward(self, batches: Sequence[Batch]) -> float:
        """Accumulate the gradient of the mean loss over all trained tokens of `batches`; returns that loss.

        The backward is that of the sum, and its gradient is divided at the end: those of the activations would else
        shrink with the number of tokens, and below what float16 holds. The mean is over the tokens of all processes,
        whose gradients the backward averages.
        """
        n_trained, total = self.world.sum(sum(batch.n_trained for batch in batches)), 0.0
        for i, batch in enumerate(batches, 1):
            with distributed.accumulating(self.parallel, last=i == len(batches)):
                loss = self.loss(batch)
                loss.backward()
            total += loss.item()
        for p in self.trainable.values():
            if p.grad is not None:
                p.grad.mul_(self.world.size / n_trained)
        return self.world.sum(total) / n_trained

    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum over the batch's trained tokens."""
        batch = batch.to(self.device)
        where = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}
        knobs = where if batch.features is None else where | {"features": batch.features}
        return self.parallel(batch.tokens, batch.labels, **knobs, reduction="sum")

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss per trained token of the held-out examples, without dropout; None if there are none."""
        if not self.held_out:
            return None
        training = self.model.training
        self.model.eval()
        total, n_trained = 0.0, 0
        for indices in self.batches(self.held_out, seed=None):
            batch = self.collate([self.held_out[i] for i in self.world.share(indices)])
            total += self.loss(batch).item()
            n_trained += batch.n_trained
        self.model.train(training)
        return self.world.sum(total) / self.world.sum(n_trained)

    # -----------------------------------------------------------------------------------------------------------------
    # Data

    def plan(self, done: int) -> Iterator[list[Batch]]:
        """This process's share of the batches of each step from `done` on."""
        epochs = count() if self.config.steps else range(self.config.epochs)
        groups = (group for epoch in epochs for group in self.epoch(epoch))
        for group in islice(groups, done, self.total):
            yield [self.collate([self.examples[i] for i in self.world.share(indices)]) for indices in group]

    def epoch(self, epoch: int) -> Iterator[list[list[int]]]:
        """Example numbers by batch by step. The last step of an epoch may have fewer batches."""
        batches = self.batches(self.examples, self.config.seed, epoch)
        for i in range(0, len(batches), self.config.accumulation):
            yield batches[i : i + self.config.accumulation]

    def batches(self, examples: Sequence[Example], seed: int | None, epoch: int = 0) -> list[list[int]]:
        c = self.config
        return epoch_batches(
            examples, batch_size=c.batch_size, max_len=c.max_len, packing=c.packing, seed=seed, epoch=epoch
        )

    def collate(self, examples: Sequence[Example]) -> Batch:
        if not examples:  # more processes than examples: the backward still needs every process
            return pad([Example([self.pad_id] * 2, [False] * 2, False, "")], self.pad_id)._replace(n_tokens=0)
        if self.config.packing:
            n_tokens = sum(len(example.inputs) for example in examples)
            return pack(examples, -(-n_tokens // PACK_TO) * PACK_TO, self.pad_id)
        return pad(examples, self.pad_id)

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer, checkpoints, logs

    def make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        matrices = [p for p in self.trainable.values() if p.dim() >= 2]
        vectors = [p for p in self.trainable.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        sharded = any(hasattr(p, "full_tensor") for p in self.trainable.values())
        fused = None if sharded else True  # one pass over memory, not seven; False would forbid foreach too
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=fused)

    def save(self, progress: dict, generators: dict) -> None:
        if self.folder is None:
            return
        state = {
            "progress": dict(progress),
            "config": asdict(self.config),
            "data": self.fingerprint,
            "parameters": {name: distributed.whole(p.detach()) for name, p in self.trainable.items()},
            "optimizer": distributed.optimizer_state(self.optimizer),
            "generators": self.world.collect(generators),
        }
        if self.world.is_main:
            self.folder.save_checkpoint(progress["step"], state)

    def resume(self, progress: dict) -> bool:
        """Take up the newest checkpoint of the folder, if there is one."""
        state = None if self.folder is None else self.world.from_main(self.folder.load_checkpoint)
        if state is None:
            return False
        try:
            self.check_same_run(state)
            self.take_up(state, progress)
        except OtherRun:
            raise
        except DAMAGE as error:
            raise ValueError(f"train: checkpoint of {self.folder.path} must be whole, got {error!r}") from error
        if self.world.is_main:
            self.folder.rewind(progress["step"])
        return True

    def take_up(self, state: dict, progress: dict) -> None:
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(distributed.part(state["parameters"][name], p))
        distributed.load_optimizer_state(self.optimizer, state["optimizer"])
        set_rng_state(state["generators"][self.world.rank])
        for key, kind in PROGRESS.items():
            progress[key] = state["progress"][key]
            if not isinstance(progress[key], kind):
                raise TypeError(f"{key} of {progress[key]!r}")

    def check_same_run(self, state: dict) -> None:
        mine = asdict(self.config) | {"processes": self.world.size}
        theirs = state["config"] | {"processes": len(state["generators"])}
        changed = [k for k in mine if k not in FREE_TO_CHANGE and mine[k] != theirs.get(k)]
        if changed:
            pairs = ", ".join(f"{k} {mine[k]} in place of {theirs.get(k)}" for k in changed)
            raise OtherRun(
                f"train: settings must equal those of the run in {self.folder.path}, got {pairs}; "
                "take another folder to start anew"
            )
        if state["data"] != self.fingerprint:
            raise OtherRun(f"train: examples must be those of the run in {self.folder.path}, got others")
        shapes = {name: list(p.shape) for name, p in self.trainable.items()}
        if shapes != {name: list(p.shape) for name, p in state["parameters"].items()}:
            raise OtherRun(f"train: trainable parameters must be those of the run in {self.folder.path}, got others")

    def forget(self) -> None:
        """Drop what a run that never reached its first checkpoint has logged."""
        if self.folder is not None and self.world.is_main:
            self.folder.rewind(-1)

    def log(self, **values) -> None:
        if self.folder is not None and self.world.is_main:
            self.folder.log(**values)

    def finish(self, progress: dict) -> dict:
        result = {
            "trainable": sum(p.numel() for p in self.trainable.values()),
            "loss_before": progress["loss_before"],
            "loss_after": self.evaluate(),
            "steps": progress["step"],
            "tokens": progress["tokens"],
            "seconds": progress["seconds"],
            "tokens_per_s": progress["tokens"] / max(progress["seconds"], 1e-9),
            "peak_memory_mb": peak_memory_mb(),
        }
        if self.folder is not None and self.world.is_main:
            if not any(line["step"] == self.total and "eval_loss" in line for line in self.folder.history()):
                self.log(step=self.total, eval_loss=result["loss_after"])
            png = self.folder.path / "loss.png"
            if self.plot and not plot_curves({self.label: self.folder.metrics}, png) and not self.quiet:
                print("no loss plot: matplotlib is not installed")
        return result

    def describe_failure(self, step: int, loss: float, grad_norm: float) -> str:
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
        kept = f"; the state after step {step - 1} is saved in {self.folder.path}" if self.folder else ""
        return f"train: loss and gradient must be finite, got {what} at step {step}{kept}"


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of the tokens, masks and features."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.tokens, example.trained)).encode())
        if example.features is not None:
            digest.update(example.features.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
