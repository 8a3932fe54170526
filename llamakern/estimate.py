"""What a fine-tuning run will cost, measured on a probe: the trainer's own forward and backward through a few blocks.

With n blocks and b sequences in a batch the process holds at its peak

    peak(n, b) = resident + working + b·per_sequence + n·(b·block + gradients of one block)

The probe measures peak(1, b), peak(3, b) and peak(1, 2b). Measuring counts what a sum over tensors would miss: buffers
of kernels, and freed blocks that the C library keeps for itself.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llamakern.data import Batch
from llamakern.peft.base import trainable
from llamakern.runs import peak_memory_mb, reset_peak_memory
from llamakern.train import Trainer

REPEATS = 3


@dataclass
class Estimate:
    fixed: dict[str, int]  # bytes by name, whatever the batch
    per_sequence: int  # bytes that each sequence of a batch adds
    batch_size: int
    seconds_per_step: float
    total_steps: int
    available: int  # bytes that were free beside the model
    measured: bool  # False where the system does not tell a part's peak: the estimate is then too low

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return self.fixed | {"activations": self.batch_size * self.per_sequence}

    @property
    def total(self) -> int:
        return self.total_at(self.batch_size)

    def total_at(self, batch_size: int) -> int:
        """Bytes at the peak with batches of another size."""
        return sum(self.fixed.values()) + batch_size * self.per_sequence

    @property
    def hours(self) -> float:
        return self.seconds_per_step * self.total_steps / 3600

    @property
    def room(self) -> int:
        """Bytes that the process may hold: those that it holds already, and those that are free."""
        return self.available + sum(self.fixed[name] for name in ("program", "frozen weights", "trained weights"))

    @property
    def largest_batch(self) -> int:
        """The greatest batch_size whose peak fits into the room."""
        return max(0, int((self.room - self.total_at(0)) // max(1, self.per_sequence)))


def estimate(trainer: Trainer) -> Estimate:
    """Probe `trainer`'s model on its fullest batch. Gradients are dropped again; nothing trains."""
    model, config, layers = trainer.model, trainer.config, len(trainer.model.layers)
    resident, available = resident_memory(trainer.device), available_memory(trainer.device)
    batch = max((batches[0] for batches in first(trainer.plan(0), 8)), key=lambda batch: batch.tokens.numel())
    deep = min(3, layers)
    peaks, seconds, measured = probe(trainer, {(1, 1): batch, (deep, 1): batch, (1, 2): twice(batch)})

    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in trainable(model).values())
    per_block = trained / layers  # gradients: they wait for the optimizer, the activations do not
    block = (peaks[deep, 1] - peaks[1, 1]) / (deep - 1) - per_block if deep > 1 else 0
    block, beside = max(0, block), max(0, peaks[1, 2] - peaks[1, 1])
    batch_bytes = layers * block + max(0, beside - block)
    working = max(0, peaks[1, 1] - resident - per_block - block - max(0, beside - block))
    per_step = seconds[1, 1]
    if deep > 1:
        per_step += (layers - 1) * max(0.0, seconds[deep, 1] - seconds[1, 1]) / (deep - 1)
    return Estimate(
        fixed={
            "program": max(0, resident - frozen - trained),
            "frozen weights": frozen,
            "trained weights": trained,
            "gradients": trained,
            "optimizer": 2 * trained,
            "gate (first steps)": trained,
            "working memory": int(working),
        },
        per_sequence=int(batch_bytes / config.batch_size),
        batch_size=config.batch_size,
        seconds_per_step=per_step * config.accumulation,
        total_steps=trainer.total,
        available=available,
        measured=measured,
    )


def seconds_per_step(trainer: Trainer) -> float:
    """Measured on the first step's batches, forward and backward; the gradients are dropped again."""
    batches = next(trainer.plan(0))
    generators, seconds = torch.get_rng_state(), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        trainer.backward(batches)
        seconds.append(time.perf_counter() - started)
    trainer.model.zero_grad(set_to_none=True)
    torch.set_rng_state(generators)
    return min(seconds)


def first(items, n: int) -> list:
    return [item for item, _ in zip(items, range(n), strict=False)]


def twice(batch: Batch) -> Batch:
    """The same sequences two times: in more rows, or packed into a longer one."""
    if batch.cu_seqlens is None:
        features = None if batch.features is None else batch.features.repeat(2, 1, 1)
        rows = batch.tokens.repeat(2, 1), batch.labels.repeat(2, 1)
        return Batch(*rows, n_tokens=2 * batch.n_tokens, features=features)
    bounds = torch.cat((batch.cu_seqlens, batch.cu_seqlens[1:] + batch.cu_seqlens[-1]))
    return Batch(batch.tokens.repeat(1, 2), batch.labels.repeat(1, 2), batch.positions.repeat(2), bounds)


Point = tuple[int, int]  # blocks, batches side by side


def probe(trainer: Trainer, batches: dict[Point, Batch]) -> tuple[dict[Point, int], dict[Point, float], bool]:
    """Bytes held at the peak of a forward and backward, its seconds, and whether the peak could be told apart."""
    model, layers, training = trainer.model, trainer.model.layers, trainer.model.training
    checkpointing, generators = model.checkpoint_activations, torch.get_rng_state()
    model.checkpoint_activations = trainer.config.checkpoint_activations
    model.train()
    peaks, seconds, measured = {}, {}, True
    try:
        for point, batch in batches.items():
            model.layers = nn.ModuleList(layers[: point[0]])
            peaks[point], seconds[point] = 0, float("inf")
            for _ in range(2):  # kernels take their buffers in the first
                measured &= reset_peak_memory()
                started = time.perf_counter()
                trainer.loss(batch).backward()
                seconds[point] = min(seconds[point], time.perf_counter() - started)
                peaks[point] = max(peaks[point], int(peak_memory_mb() * 2**20))
                model.zero_grad(set_to_none=True)
    finally:
        model.layers, model.checkpoint_activations = layers, checkpointing
        model.train(training)
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(generators)
    return peaks, seconds, measured


def resident_memory(device: torch.device) -> int:
    """Bytes that this process holds now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return int(peak_memory_mb() * 2**20)


def available_memory(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
