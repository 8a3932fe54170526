"""What can be measured: the cases of each room, with shapes named after real models."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from llamakern.bench.clock import on_gpu
from llamakern.bench.table import Table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU_DTYPES = DTYPES[1:2]  # what models run in there
MATMUL_DTYPES = DTYPES[:2]  # torch multiplies float16 matrices on a CPU up to a thousand times as long as ours takes
ROOMS = ("attention", "block", "excitor", "lora", "loss", "moe", "nf4", "norm", "rope", "scale", "swiglu")


@dataclass(frozen=True)
class Case:
    """Races of one op: rows(table, label, dtype, **shape) adds the lines of one shape."""

    op: str
    rows: Callable
    shapes: dict[str, dict[str, int]]
    dtypes: tuple = MATMUL_DTYPES
    axis: str = ""  # of the curve: the size that grows
    curve: dict[str, dict[str, int]] = field(default_factory=dict)  # in bfloat16
    gpu: dict[str, dict[str, int]] = field(default_factory=dict)  # in place of shapes on a GPU, in bfloat16

    def sizes(self) -> dict[str, int | None]:
        """The letters of a shape and their defaults, None where there is none."""
        words = list(inspect.signature(self.rows).parameters.values())[3:]
        return {word.name: None if word.default is word.empty else word.default for word in words}

    def run(self, table: Table) -> None:
        for dtype in GPU_DTYPES if on_gpu() else self.dtypes:
            for label, shape in ((on_gpu() and self.gpu) or self.shapes).items():
                self.rows(table, f"{label} {name(dtype)}", dtype, **shape)

    def run_curve(self, table: Table) -> None:
        for label, shape in self.curve.items():
            self.rows(table, label, torch.bfloat16, **shape)

    def run_shape(self, table: Table, shape: dict[str, int], dtype: torch.dtype) -> None:
        """One shape of the user's. ValueError if it names other sizes than the case has."""
        sizes = self.sizes()
        missing = [letter for letter, default in sizes.items() if default is None and letter not in shape]
        if missing or not set(shape) <= set(sizes):
            wanted = ",".join(letter + ("" if value is None else f"={value}") for letter, value in sizes.items())
            raise ValueError(f"bench: shape of {self.op} must name {wanted}, got {','.join(shape) or 'none'}")
        self.rows(table, " ".join(f"{k}={v}" for k, v in shape.items()) + f" {name(dtype)}", dtype, **shape)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(wanted: str) -> tuple[str, list[Case]]:
    """The room and the cases behind the name of a room or of an op. ValueError names the known ones."""
    rooms = {room: importlib.import_module(f"llamakern.bench.{room}").CASES for room in ROOMS}
    if wanted in rooms:
        return wanted, list(rooms[wanted])
    for room, some in rooms.items():
        if chosen := [case for case in some if case.op == wanted]:
            return room, chosen
    known = sorted({*rooms, *(case.op for some in rooms.values() for case in some)})
    raise ValueError(f"bench: what must be one of {', '.join([*known, 'step', 'generate'])}, got {wanted!r}")
