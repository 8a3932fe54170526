"""What `llamakern bench` does: chosen cases, one table for each room."""

import argparse
import re
from contextlib import nullcontext

import torch

from llamakern import _C
from llamakern.bench import models
from llamakern.bench.cases import DTYPES, ROOMS, cases, name
from llamakern.bench.table import Table
from llamakern.bench.table import add_arguments as add_table_arguments

WHOLE = ("step", "generate")  # beside the rooms: models of random weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", default=[], help=f"rooms or ops, or {' or '.join(WHOLE)}; else all rooms")
    parser.add_argument("--shape", help="of one op, such as M=16,N=4096,K=4096")
    parser.add_argument(
        "--dtype", choices=[name(dtype) for dtype in DTYPES], help="of --shape, step, generate: bfloat16"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the ops run (%(default)s)")
    parser.add_argument("--curve", action="store_true", help="the curves over T or M, in place of the tables")
    add_table_arguments(parser)
    models.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """All tables asked for. ValueError after the last of them if rows of one became slower."""
    if arguments.device == "cuda" and not (_C.cuda_built and torch.cuda.is_available()):
        raise ValueError("bench: device must be cpu where no CUDA engine was built or no GPU is there, got cuda")
    with torch.device("cuda") if arguments.device == "cuda" else nullcontext():
        run_tables(arguments)


def run_tables(arguments: argparse.Namespace) -> None:
    wanted = arguments.what or [room for room in ROOMS if not arguments.curve or cases(room)[1][0].curve]
    dtype = getattr(torch, arguments.dtype or "bfloat16")
    for flag in ("json", "compare"):
        place = getattr(arguments, flag)
        if place is not None and place.suffix == ".json" and len(wanted) > 1:
            raise ValueError(f"bench: {flag} must be a folder for {len(wanted)} tables, got {place}")
    if (arguments.shape or arguments.dtype) and len(wanted) > 1:
        raise ValueError(f"bench: shape and dtype must go with one op, got {len(wanted)}")
    if arguments.shape and wanted[0] in WHOLE:
        raise ValueError(f"bench: shape must go with an op, got {wanted[0]}")
    if arguments.dtype and not arguments.shape and wanted[0] not in WHOLE:
        raise ValueError(f"bench: dtype must go with a shape, step or generate, got {wanted[0]}")
    chosen = [(what, None if what in WHOLE else cases(what)) for what in wanted]
    slower = []
    for what, found in chosen:
        table = fill(arguments, what, found, dtype)
        try:
            table.done()
        except ValueError as error:
            slower.append(str(error))
    if slower:
        raise ValueError("\n".join(slower))


def fill(arguments: argparse.Namespace, what: str, found, dtype: torch.dtype) -> Table:
    """The table of one room, op or whole model."""
    if what in WHOLE:
        from llamakern.bench import generate, step

        table = Table(what, arguments)
        (step if what == "step" else generate).run(table, arguments, dtype)
        return table
    room, some = found
    if arguments.shape:
        some = some if len(some) == 1 else [case for case in some if case.op == what]  # attention is a room and an op
        if not some:
            known = ", ".join(case.op for case in found[1])
            raise ValueError(f"bench: shape must go with one of {known}, got {what}")
        table = Table(room, arguments)
        some[0].run_shape(table, parse_shape(arguments.shape), dtype)
        return table
    if arguments.curve:
        some = [case for case in some if case.curve]
        if not some:
            raise ValueError(f"bench: curve must go with a room that has one, got {what}")
        table = Table(f"{room}_curve", arguments, axis=some[0].axis)
        for case in some:
            case.run_curve(table)
        return table
    table = Table(room, arguments)
    for case in some:
        case.run(table)
    return table


def parse_shape(text: str) -> dict[str, int]:
    """ "M=16,N=4096" -> {"M": 16, "N": 4096}. ValueError for what is no such list."""
    if not re.fullmatch(r"\w+=[1-9]\d*(,\w+=[1-9]\d*)*", text):
        raise ValueError(f"bench: shape must look like M=16,N=4096,K=4096, got {text!r}")
    return {letter: int(size) for letter, size in (word.split("=") for word in text.split(","))}
