"""What a fine-tuning run will cost: memory by part and seconds a step, from a probe of one and of two blocks."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llamakern.data import Batch
from llamakern.peft.base import trainable
from llamakern.runs import peak_memory_mb
from llamakern.train import Trainer

REPEATS = 3


@dataclass
class Estimate:
    parts: dict[str, int]  # bytes by name
    activations_per_sequence: int  # bytes
    seconds_per_step: float
    total_steps: int
    available: int  # bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        return self.seconds_per_step * self.total_steps / 3600

    @property
    def largest_batch(self) -> int:
        """How many sequences fit into the memory that is free now, beside everything else."""
        fixed = sum(self.parts[name] for name in ("gradients", "optimizer", "gate (first steps)"))
        return max(0, int((self.available - fixed) // max(1, self.activations_per_sequence)))


def estimate(trainer: Trainer) -> Estimate:
    """Probe `trainer`'s model on its fullest batch. Gradients are dropped again; nothing trains."""
    model, config = trainer.model, trainer.config
    resident = resident_memory(trainer.device)
    batch = max((batches[0] for batches in first(trainer.plan(0), 8)), key=lambda batch: batch.tokens.numel())
    seconds, saved = probe(trainer, batch)
    layers = len(model.layers)
    if config.checkpoint_activations:
        block_input = batch.tokens.numel() * model.config.dim * model.embed_tokens.weight.element_size()
        activations = saved[1] + layers * block_input
        seconds[2] += (seconds[2] - seconds[1]) / 3  # the forward runs twice
    else:
        activations = saved[1] + (layers - 1) * (saved[2] - saved[1])
    per_batch = seconds[1] + (layers - 1) * max(0.0, seconds[2] - seconds[1])
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in trainable(model).values())
    parts = {
        "program": max(0, resident - frozen - trained),
        "frozen weights": frozen,
        "trained weights": trained,
        "gradients": trained,
        "optimizer": 2 * trained,
        "gate (first steps)": trained,
        "activations": int(activations),
        "one block's gradients": int(saved[2] - saved[1]) if layers > 1 else int(saved[1]),
    }
    return Estimate(
        parts=parts,
        activations_per_sequence=int(activations) // config.batch_size,
        seconds_per_step=per_batch * config.accumulation,
        total_steps=trainer.total,
        available=available_memory(trainer.device),
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


def probe(trainer: Trainer, batch: Batch) -> tuple[dict[int, float], dict[int, int]]:
    """Seconds and bytes kept for the backward, with one block and with two (or with all, where there is one only)."""
    model, layers = trainer.model, trainer.model.layers
    model.checkpoint_activations = False
    training = model.training
    model.train()
    generators = torch.get_rng_state()
    seconds, saved = {}, {}
    try:
        for n in (1, 2):
            model.layers = nn.ModuleList(layers[:n])
            counter = SavedBytes(model)
            with counter:
                loss = trainer.loss(batch)
            loss.backward()
            saved[n] = counter.bytes
            seconds[n] = min(timed(trainer, batch) for _ in range(REPEATS))
    finally:
        model.layers = layers
        model.train(training)
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(generators)
    if len(layers) == 1:
        seconds[2], saved[2] = seconds[1], saved[1]
    return seconds, saved


def timed(trainer: Trainer, batch: Batch) -> float:
    started = time.perf_counter()
    trainer.loss(batch).backward()
    return time.perf_counter() - started


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward, each storage once and parameters not at all."""

    def __init__(self, model: nn.Module):
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self):
        return self.hooks.__enter__()

    def __exit__(self, *error):
        return self.hooks.__exit__(*error)


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
