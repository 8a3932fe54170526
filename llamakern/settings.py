"""Settings from a YAML file and `key=value` words into a flat dataclass: its fields are the keys."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml


def build(kind: type, file: str | Path | None, words: Iterable[str]):
    """A `kind` from its defaults, then the YAML file, then `key=value` words, each overriding what came before.

    Where the kind has a field `options`, a dict of dicts, the word `a.b=c` sets options["a"]["b"], and so does an
    unknown key of the file that holds keys itself.
    ValueError for an unknown key (it suggests the nearest) and for a value of the wrong type.
    """
    values = {} if file is None else read_yaml(file)
    nested = "options" in names(kind)
    if nested:
        options = {key: dict(value) for key, value in (values.pop("options", None) or {}).items()}
        for key in [key for key, value in values.items() if isinstance(value, dict) and key not in names(kind)]:
            options.setdefault(str(key), {}).update(values.pop(key))
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"settings: an argument must be key=value, got {word!r}")
        group, dot, key = key.strip().replace("-", "_").rpartition(".")
        if dot and nested:
            options.setdefault(group, {})[key] = value
        else:
            values[f"{group}{dot}{key}"] = value
    return make(kind, values | ({"options": options} if nested else {}))


def make(kind: type, values: Mapping[str, object]):
    """A `kind` from its defaults and values as YAML or JSON give them."""
    types_ = typing.get_type_hints(kind)
    return kind(**{key: convert(key, value, types_[known(str(key), types_)]) for key, value in values.items()})


def read_yaml(file: str | Path) -> dict:
    if not Path(file).is_file():
        raise FileNotFoundError(f"settings: config must be a YAML file, got {file}")
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"settings: {file} must be YAML, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"settings: {file} must hold key: value lines, got {type(values).__name__}")
    return values


def known(key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    if key not in keys:
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; the keys are {', '.join(keys)}"
        raise ValueError(f"settings: unknown key {key}{hint}")
    return key


def convert(key: str, value: object, kind: object):
    """`value` as the type of its field. Words from the command line come as strings, YAML's `1e-4` too."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if type(None) in options and str(value).lower() in ("none", "null", ""):
        return None
    kind = [option for option in options if option is not type(None)][-1]  # a tuple of names rather than one
    base = typing.get_origin(kind) or kind
    try:
        if base is tuple:
            return tuple(convert(key, item, typing.get_args(kind)[0]) for item in to_items(value))
        if base is dict:
            _, inner = typing.get_args(kind) or (str, None)
            return {str(k): v if inner is None else convert(key, v, inner) for k, v in to_mapping(value).items()}
        return CONVERT[base](value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise ValueError(f"settings: {key} must be {base.__name__}, got {value!r}") from None


def to_bool(value: object) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def to_int(value: object) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def to_str(value: object) -> str:
    if value is None or isinstance(value, dict | list):
        raise ValueError
    return str(value)


def to_items(value: object) -> list:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)


def to_mapping(value: object) -> dict:
    if isinstance(value, Mapping):
        return dict(value)
    return {k.strip(): v.strip() for k, v in (pair.split("=") for pair in value.split(",") if pair)}


CONVERT = {bool: to_bool, int: to_int, float: float, str: to_str}


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
