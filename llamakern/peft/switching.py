"""Several adapters on one model. One at most is active: its modules stand around the base's.

An adapter is one method, or several together. Switching exchanges modules by reference. It copies no tensor, and
without an active adapter the model is the base, bit for bit. Adapters that are not active stay in memory but are no
part of the model: `model.parameters()` and `state_dict()` know the active one only, under the same names whichever it
is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from llamakern.peft.base import Method, Parts, freeze, own, replace


@dataclass
class Adapter:
    """What one adapter puts into a model: its methods by ascending order, and the parts of each.

    places are the modules of all parts in the order in which they are put: (name, the module that holds it, itself).
    Of the parameters of the parts those are here that are not in the model now: the adapter's own, or while it is
    active the base's.
    """

    methods: tuple[Method, ...]
    parts: tuple[Parts, ...]
    places: list[tuple[str, nn.Module, nn.Module]]

    @property
    def config(self) -> Method | tuple[Method, ...]:
        return self.methods[0] if len(self.methods) == 1 else self.methods

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Its modules by name; where several stand at one place, the outermost."""
        return {path: module for path, _, module in self.places}

    @property
    def keeps_base(self) -> bool:
        return all(method.keeps_base for method in self.methods)


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model carries, active or not, oldest first."""
    return list(carried(model))


def active(model: nn.Module) -> str | None:
    """Name of the adapter that works now; None where the model is the base."""
    return getattr(model, "peft_active", None)


def activate(model: nn.Module, name: str | None) -> nn.Module:
    """The model itself with this adapter at work in place of the one before; with None it is the base.

    ValueError for a name that the model does not carry, and where full fine-tuning has changed the base itself.
    """
    if name is not None:
        find(model, name)
    if (old := active(model)) is not None:
        if not carried(model)[old].keeps_base and name != old:
            raise ValueError(f"peft: name must stay {old!r}, got {name!r}: full fine-tuning changed the base itself")
        take_out(carried(model)[old])
        exchange(model, carried(model)[old])
    if name is not None:
        exchange(model, carried(model)[name])
        put_in(carried(model)[name])
    model.peft_active = name
    model.peft_config = None if name is None else carried(model)[name].config
    return model


def add(model: nn.Module, name: str, methods: Sequence[Method], fill=lambda adapter: None) -> None:
    """Freeze the base, give the model a fresh adapter of these methods and activate it.

    fill(adapter) may set the numbers of the parts. ValueError, the model as it was, if it raises, if the name is none
    or taken, or if a method finds no place.
    """
    if not isinstance(name, str):
        raise ValueError(f"peft: name must be a string, got {name!r}")
    if name in carried(model):
        raise ValueError(f"peft: name must be new, got {name!r}, which the model carries; remove or merge it first")
    check(model, methods)
    methods = tuple(sorted((method.resolved(model) for method in methods), key=lambda method: method.order))
    with base_of(model):
        adapter = build(model, methods)
        fill(adapter)
        if not carried(model):
            freeze(model)
        for parts in adapter.parts:
            for p in (*parts.parameters.values(), *(p for m in parts.modules.values() for p in own(m).values())):
                p.requires_grad_(True)
        model.peft_adapters = carried(model) | {name: adapter}
    activate(model, name)


def check(model: nn.Module, methods: Sequence[Method]) -> None:
    """ValueError for what cannot stand together."""
    if not methods:
        raise ValueError("peft: config must name at least one method, got none")
    for method in methods:
        if not isinstance(method, Method):
            raise ValueError(f"peft: config must be a Method such as LoRAConfig, got {type(method).__name__}")
    kinds = [method.kind for method in methods]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"peft: config must hold each method once, got {kinds}")
    lonely = [method.kind for method in methods if not method.keeps_base]
    if lonely and (len(methods) > 1 or carried(model)):
        raise ValueError(f"peft: {lonely[0]} must stand alone, got {kinds} beside {adapters(model)}")
    if changed := [name for name, adapter in carried(model).items() if not adapter.keeps_base]:
        raise ValueError(f"peft: model must keep its base to carry more, got {changed[0]!r}, which trains it")


def build(model: nn.Module, methods: Sequence[Method]) -> Adapter:
    """Parts of all methods, each made for the model with those before it in place. The model is left as it was."""
    adapter = Adapter(tuple(methods), (), [])
    try:
        for method in methods:
            parts = method.attach(model)
            if taken := [path for path in parts.parameters for p in adapter.parts if path in p.parameters]:
                raise ValueError(f"peft: methods must train tensors of their own, got {method.kind} with {taken[0]}")
            places = [(path, model.get_submodule(path.rpartition(".")[0]), m) for path, m in parts.modules.items()]
            put_in(Adapter((method,), (parts,), places))
            adapter.parts += (parts,)
            adapter.places += places
    finally:
        take_out(adapter)
    return adapter


@contextmanager
def base_of(model: nn.Module) -> Iterator[None]:
    """The model without an active adapter, for as long as the block lasts."""
    before = active(model)
    if before is not None and not carried(model)[before].keeps_base:
        yield  # there is no other base
        return
    activate(model, None)
    try:
        yield
    finally:
        activate(model, before)


def remove(model: nn.Module, name: str) -> nn.Module:
    """The model itself without this adapter; it is the base if that one was active. ValueError for an unknown name."""
    find(model, name)
    if active(model) == name:
        activate(model, None)
    model.peft_adapters = {other: adapter for other, adapter in carried(model).items() if other != name}
    return model


def carried(model: nn.Module) -> dict[str, Adapter]:
    return getattr(model, "peft_adapters", {})


def find(model: nn.Module, name: str) -> Adapter:
    if name not in carried(model):
        raise ValueError(f"peft: name must be one of {adapters(model)}, got {name!r}")
    return carried(model)[name]


def put_in(adapter: Adapter) -> None:
    """The adapter's modules stand in the model, around what stood there."""
    for path, parent, module in adapter.places:
        base = put(parent, path, module)
        if getattr(module, "base", None) is not base:  # replaced while this adapter was away, as by quantize_
            module.base = base
        device = next((p.device for p in (base or parent).parameters()), None)
        if device is not None and any(p.device != device for p in own(module).values()):
            module.to(device)
        training = parent.training if base is None else base.training
        if module.training != training:
            module.train(training)


def take_out(adapter: Adapter) -> None:
    """The inverse of `put_in`."""
    for path, parent, module in reversed(adapter.places):
        put(parent, path, getattr(module, "base", None))


def put(parent: nn.Module, path: str, module: nn.Module | None) -> nn.Module | None:
    """The module stands where `path` ends, in place of the one returned: Module.__setattr__ takes far longer."""
    children, name = parent._modules, path.rpartition(".")[2]
    before, children[name] = children[name], module
    return before


def exchange(model: nn.Module, adapter: Adapter) -> None:
    """Swap the adapter's parameters with the model's. The adapter's modules must not stand in the model."""
    for parts in adapter.parts:
        for path, other in parts.parameters.items():
            owner = model.get_submodule(path.rpartition(".")[0])
            parts.parameters[path] = getattr(owner, path.rpartition(".")[2])
            replace(model, path, other)
