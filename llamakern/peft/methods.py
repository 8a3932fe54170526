"""The methods by name. qlora is LoRA over a base quantised to NF4."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

from llamakern.peft.adapter import AdapterConfig
from llamakern.peft.adapter_v2 import AdapterV2Config
from llamakern.peft.base import Method
from llamakern.peft.excitor import ExcitorConfig
from llamakern.peft.expert_lora import ExpertLoRAConfig
from llamakern.peft.full import FullConfig
from llamakern.peft.lora import LoRAConfig
from llamakern.peft.prompt import PromptConfig

METHODS: dict[str, type[Method]] = {
    "lora": LoRAConfig,
    "qlora": LoRAConfig,
    "experts": ExpertLoRAConfig,
    "adapter": AdapterConfig,
    "adapter_v2": AdapterV2Config,
    "excitor": ExcitorConfig,
    "prompt": PromptConfig,
    "full": FullConfig,
}


def register(kind: type[Method]) -> type[Method]:
    """Makes a method from outside known under its `kind`, for the command line and for `load`.

    ValueError if it is no dataclass derived from Method, or if its name is empty or another's.
    """
    if not (isinstance(kind, type) and issubclass(kind, Method) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"peft: a method must be a dataclass derived from llamakern.peft.Method, got {kind!r}")
    if not kind.kind.isidentifier():
        raise ValueError(f"peft: kind of {kind.__name__} must be a name, got {kind.kind!r}")
    known = METHODS.get(kind.kind)
    if known is not None and (known.__qualname__, source(known)) != (kind.__qualname__, source(kind)):
        raise ValueError(f"peft: kind of {kind.__name__} must be new, got {kind.kind!r}, which is {known.__name__}")
    METHODS[kind.kind] = kind
    return kind


def source(kind: type) -> str | None:
    """The file that a class was written in."""
    return getattr(sys.modules.get(kind.__module__), "__file__", None)


def find_method(name: str) -> type[Method]:
    """The method of this name; "./mine.py:MyConfig" runs that file and registers the class.

    ValueError for an unknown name, FileNotFoundError without the file.
    """
    if ".py:" not in name:
        if name not in METHODS:
            raise ValueError(f"peft: method must be one of {list(METHODS)} or file.py:Class, got {name!r}")
        return METHODS[name]
    file, _, attribute = name.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"peft: method must name a Python file, got {file}")
    module = load_module(path)
    if not hasattr(module, attribute):
        raise ValueError(f"peft: {file} must define {attribute}, got a file without")
    return register(getattr(module, attribute))


def load_module(path: Path):
    """The module of a Python file, run once for each process."""
    name = f"llamakern_method_{path.stem}_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
