"""The gate: training must not be fake. Over the first steps every trainable tensor must receive a gradient and move."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from llamakern.distributed import whole

STEPS = 5  # LoRA's A has no gradient in the first step, because B is zero there
SHOWN = 12  # names in one message


class GateError(RuntimeError):
    """Some trainable tensors do not train."""


class Gate:
    """Watches the first `STEPS` steps with lr > 0, then raises GateError with the names of the tensors that failed.

    Between optimizer.step() and zero_grad() call `observe()`. At the end of a run shorter than that call `close()`.
    A gradient that is not finite ends the watch at once: a step later it has spread to every tensor. Until it has
    judged, the gate holds a copy of every trainable tensor.

    Of a stack of experts each is looked at by itself: one that received no token has a gradient of zeros. It is no
    error, but it is not trained: the gate warns, and `unused` names it.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter]):
        self.trainable = dict(trainable)
        self.received = set()
        self.experts: dict[str, torch.Tensor] = {}  # which experts of a stack received a gradient
        self.unused: list[str] = []
        self.seen, self.judged, self.hooks = 0, False, []
        self.begin()

    def begin(self) -> None:
        """From here on a tensor has to move."""
        self.start = {name: p.detach().clone() for name, p in self.trainable.items()}

    @torch.no_grad()
    def observe(self) -> None:
        if self.judged:
            return
        self.seen += 1
        gradients = {name: p.grad for name, p in self.trainable.items() if p.grad is not None}
        gradients = {name: grad._values() if grad.is_sparse else grad for name, grad in gradients.items()}
        if bad := [name for name, grad in gradients.items() if not whole(torch.isfinite(grad).all())]:
            self.finish({"a gradient that is not finite": bad})
        # moving is not enough: weight decay alone moves a tensor
        self.received |= {name for name, grad in gradients.items() if whole(grad.any())}
        for name, grad in gradients.items():
            if is_stack(name, grad):
                self.experts[name] = self.experts.get(name, False) | grad.flatten(1).any(1)
        if self.seen == STEPS:
            self.judge()

    def close(self) -> None:
        """Judge a run that ended early; after a single step there is nothing to say about LoRA's A."""
        if not self.judged and self.seen >= 2:
            self.judge()
        self.detach()

    def judge(self) -> None:
        faults = {"no gradient, or one of zeros": [name for name in self.trainable if name not in self.received]}
        for name, p in self.trainable.items():
            if torch.equal(self.start[name], p):
                rounded = name in self.received and p.dtype.itemsize < 4
                why = f" ({str(p.dtype).removeprefix('torch.')} rounds small steps away)" if rounded else ""
                faults.setdefault(f"no change{why}", []).append(name)
        if stuck := self.judge_experts():
            faults["an expert that received tokens and did not move"] = stuck
        self.finish(faults)

    def judge_experts(self) -> list[str]:
        """Fills `unused`, and returns the experts that received tokens in vain."""
        stacks: dict[str, list[str]] = {}
        for name in self.experts:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
        stuck = []
        for path, names in stacks.items():
            used = torch.stack([self.experts[name] for name in names])
            moved = torch.stack([(self.start[n] != self.trainable[n]).flatten(1).any(1) for n in names])
            self.unused += [f"{path}[{e}]" for e in (~used.any(0)).nonzero().flatten().tolist()]
            stuck += [f"{path}[{e}]" for e in (used.any(0) & ~(used & moved).any(0)).nonzero().flatten().tolist()]
        if self.unused:
            warnings.warn(
                f"gate: an expert must receive tokens to be trained, got none in {self.seen} steps for "
                f"{listed(self.unused)}",
                stacklevel=2,
            )
        return stuck

    def finish(self, faults: Mapping[str, list[str]]) -> None:
        self.judged, self.start = True, {}
        self.detach()
        if any(faults.values()):
            raise GateError(
                f"gate: every trainable tensor must receive a finite gradient and move in the first {STEPS} steps, "
                f"got {described(faults)}"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Hooks of an optimizer

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Observe each step of `optimizer` that has a learning rate above 0 and is not skipped for overflow."""
        before, after = self.before_step, self.after_step
        self.hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def before_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        if self.seen == 0:  # a checkpoint may have been loaded since the gate was made
            self.begin()

    def after_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer is told by the GradScaler, and then waits
        if any(float(g["lr"]) > 0 for g in optimizer.param_groups) and not (overflow is not None and overflow.any()):
            self.observe()


def check_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Gate:
    """Let any trainer refuse to be fake: call it after the optimizer is made, with the model that trains.

    Over the first five steps with lr > 0 every parameter of `model` that requires a gradient must receive a finite one
    that is not zero, and move; after that the gate's hooks are gone. It hooks optimizer.step(), so gradient
    accumulation counts as one step, and steps that a GradScaler skips or whose learning rates are all 0 do not count.
    accelerate's wrapper of an optimizer is looked through.

    Returns the gate: `close()` it after a run shorter than five steps, or to take it off.
    Raises GateError, naming the tensors (tied ones by all their names): at once for parameters that train but are not
    in the optimizer, else from the step that ends the watch. Frozen parameters in the optimizer do no harm. ValueError
    for a model without trainable parameters, TypeError for what is not an optimizer.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"check_training: optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    trainable = {name: p for name, p in all_names(model).items() if p.requires_grad}
    if not trainable:
        raise ValueError("check_training: model must have a trainable parameter, got none")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, p in trainable.items() if id(p) not in held]:
        raise GateError(f"gate: the optimizer must hold every trainable tensor, got none of {listed(missing)}")
    gate = Gate(trainable)
    gate.attach(optimizer)
    return gate


def is_stack(name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter holds one matrix for each expert of a layer."""
    return tensor.dim() == 3 and ".experts." in f".{name}" and not hasattr(tensor, "device_mesh")


def all_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, a tied one under all its names: "embed_tokens.weight = lm_head.weight"."""
    names: dict[int, list[str]] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, p in parameters:
        names.setdefault(id(p), []).append(name)
    return {" = ".join(names[id(p)]): p for _, p in parameters}


def described(faults: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
