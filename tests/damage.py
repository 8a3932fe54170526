"""Hypothesis strategies that damage a file: its bytes, the values and keys of its JSON, the tensors it holds."""

import io
import json
import struct

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

NUMBERS = (-1, 0, 1, 3, 7, 2**31 - 1, 2**31, 10**9, 10**18, 10**30, -(2**63))
VALUES = (
    None, True, False, *NUMBERS, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "1", "\ud800", "../x",
    "/dev/zero", [], [0], [-1], ["x"], [[]], {}, {"x": 1}, "x" * 5000,
)  # fmt: skip


def damaged_bytes(content: bytes, head: int = 200):
    """`content` cut short, with bytes changed, put in, or left out; half of the time in its first `head` bytes."""
    n = len(content)
    where = st.integers(0, min(n, head)) | st.integers(0, n)
    numbers = st.sampled_from(NUMBERS).map(lambda i: (i % 2**64).to_bytes(8, "little"))
    long = st.sampled_from((b"\xff" * 8, b"\0" * 8, b"{[" * 4))
    new = st.binary(max_size=8) | numbers | numbers.map(lambda b: b[:4]) | long

    def damage(at, kind, data):
        tails = {"cut": b"", "write": data + content[at + len(data) :], "insert": data + content[at:]}
        return content[:at] + tails.get(kind, content[at + 8 :])

    return st.builds(damage, where, st.sampled_from(("cut", "write", "insert", "delete")), new)


def damaged_value(value, values=VALUES):
    """A copy of a tree of dicts and lists with one place replaced, removed, or under another key."""

    def damage(path, kind, new):
        return edited(value, path, kind, new)

    kinds = st.sampled_from(("replace", "replace", "remove", "rename"))
    return st.builds(damage, st.sampled_from(list(paths(value))), kinds, st.sampled_from(values))


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def edited(value, path, kind, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = path[0]
    if len(path) > 1 or kind == "replace":
        copy[key] = edited(copy[key], path[1:], kind, new)
        return copy
    old = copy.pop(key)
    if kind == "rename":
        if isinstance(copy, dict):
            copy[str(new)] = old
        else:
            copy += [old, old]
    return copy


def damaged_json(content: bytes):
    """JSON text with one value or key damaged, or with its bytes damaged."""
    return damaged_value(json.loads(content)).map(lambda v: json.dumps(v).encode()) | damaged_bytes(content)


def damaged_safetensors(content: bytes):
    """A safetensors file with its bytes, its header, or one of its tensors damaged."""
    n = struct.unpack_from("<Q", content)[0]

    def with_header(header):
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + n :]

    header = damaged_value(json.loads(content[8 : 8 + n])).map(with_header)
    return header | damaged_bytes(content) | damaged_tensors(load(content)).map(save)


def pickled(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def damaged_pickle(content: bytes):
    """A file of torch.save with its bytes, a value of its tree, or one of its tensors damaged."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    flat = all(isinstance(value, torch.Tensor) for value in tree.values())
    odd = (None, -1, 10**9, "x", [], {}, {"x": 1}, torch.zeros(3), torch.zeros(0), torch.zeros(2).byte())
    whole = damaged_value(tree, odd).map(pickled) | damaged_bytes(content, head=1000)
    return whole | damaged_tensors(tree).map(pickled) if flat else whole


def damaged_tensors(tensors: dict):
    """One tensor left out, renamed, reshaped, cut, cast or filled; a quant_state's JSON damaged."""
    edits = {
        "flatten": lambda t: t.flatten(),
        "cut": lambda t: t.flatten()[:-1],
        "double": lambda t: torch.cat([t, t]) if t.dim() else t.repeat(2),
        "transpose": lambda t: t.t() if t.dim() == 2 else t[None],
        "empty": lambda t: t.flatten()[:0],
        "bytes": lambda t: t.to(torch.uint8),
        "float64": lambda t: t.double(),
        "int64": lambda t: t.long(),
        "nan": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    }

    def damage(name, kind, other):
        copy = dict(tensors)
        old = copy.pop(name)
        if kind == "rename":
            copy[f"{name}.x"] = old
        elif kind == "swap":
            copy[name] = tensors[other]
        elif kind in edits:
            copy[name] = edits[kind](old)
        return {k: t.contiguous().clone() for k, t in copy.items()}

    names = st.sampled_from(sorted(tensors))
    plain = st.builds(damage, names, st.sampled_from(("remove", "rename", "swap", *edits)), names)
    states = [name for name in sorted(tensors) if "quant_state" in name]
    return plain | st.sampled_from(states).flatmap(lambda name: damaged_state(tensors, name)) if states else plain


def damaged_state(tensors: dict, name: str):
    return damaged_json(bytes(tensors[name].tolist())).map(
        lambda text: tensors | {name: torch.tensor(list(text), dtype=torch.uint8)}
    )
