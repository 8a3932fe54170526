"""`llamakern.verify`: do two models compute the same? Logits, loss and gradients, each beside low-precision noise.

A difference means nothing alone: bfloat16 keeps eight bits, and two right ways to compute differ in the last of them.
So each difference stands beside what low precision itself changes in the first model.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamakern.data import IGNORED, Batch

LOW = (torch.bfloat16, torch.float16)
# A result is as good as another where its error is at most 2 times the other's at worst and 1.5 times in the mean; the
# difference of the two holds both errors.
WORST, MEAN = 1 + 2, 1 + 1.5
SHOWN = 12  # gradient rows of a printed table
CHUNK = 1 << 22  # numbers compared at a time


class Row(NamedTuple):
    """One compared tensor: largest and mean absolute difference, and the same two of the noise."""

    worst: float
    mean: float
    noise_worst: float
    noise_mean: float

    @property
    def share(self) -> float:
        """How much of what is allowed the difference takes, for its worst or its mean; nan if not all are finite."""
        if not all(map(math.isfinite, self)):
            return math.nan
        pairs = ((self.worst, WORST * self.noise_worst), (self.mean, MEAN * self.noise_mean))
        return max(x / limit if limit > 0 else x * math.inf if x else 0.0 for x, limit in pairs)


@dataclass
class Comparison:
    """What `verify` found. `print` it for the table, ask `ok` for the verdict.

    logits, loss: rows. gradients: one row per trainable tensor, by the name that both models share.
    unmatched: trainable tensors that only one of them has; they were not compared.
    """

    logits: Row
    loss: Row
    gradients: dict[str, Row]
    losses: tuple[float, float]  # a's and b's
    dtype: torch.dtype  # whose noise
    unmatched: list[str] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, Row]:
        return {"logits": self.logits, "loss": self.loss, **self.gradients}

    def within(self, share: float) -> bool:
        """Whether every tensor was compared and takes at most this share of what is allowed."""
        return not self.unmatched and all(row.share <= share for row in self.rows.values())

    @property
    def ok(self) -> bool:
        """Whether the differences are low precision's: each at most 3 times its noise at worst, 2.5 in the mean.

        That is a's own error, and one of b at most 2 and 1.5 times as large. False where nan is met.
        """
        return self.within(1.0)

    def __str__(self) -> str:
        noise = str(self.dtype).removeprefix("torch.")
        shown = sorted(self.gradients, key=lambda name: nan_is_most(self.gradients[name].share), reverse=True)[:SHOWN]
        width = max(8, *(len(name) for name in shown)) if shown else 8
        lines = [f"{'':{width}}  {'worst':>9} {'mean':>9} | {noise:>9} noise, mean | of what is allowed"]
        for name in ("logits", "loss", *shown):
            r = self.rows[name]
            numbers = f"{r.worst:9.1e} {r.mean:9.1e} | {r.noise_worst:9.1e} {r.noise_mean:11.1e}"
            lines.append(f"{name:{width}}  {numbers} | {r.share:.2%}")
        if len(self.gradients) > len(shown):
            lines.append(f"and {len(self.gradients) - len(shown)} gradients with smaller shares")
        lines += [f"not compared, only one model trains it: {name}" for name in self.unmatched]
        verdict = "every difference is within the noise" if self.ok else "NOT THE SAME beyond the noise"
        lines.append(f"loss {self.losses[0]:.6f} and {self.losses[1]:.6f}: {verdict}")
        return "\n".join(lines)


def verify(
    a: nn.Module, b: nn.Module | Callable[[nn.Module], object], batch: Mapping[str, Tensor] | Batch | Tensor
) -> Comparison:
    """Compare two models that should compute the same: logits, loss and the gradient of every trainable tensor.

    a, b    transformers' models (PEFT's too) or this package's. b may also be a function that is called with `a` and
            changes it in place, or returns another model: `verify(model, llamakern.patch, batch)` leaves the model
            patched. LoRA's A has no gradient while B is 0, so fill B, or compare after some steps.
    batch   a dict as transformers' models take it (input_ids (B, T), labels (B, T), which the model shifts itself,
            attention_mask, position_ids), a `llamakern.data.Batch`, or tokens (B, T) alone, all of them trained.
            Each model gets it in its own form; a label at the last position of a Batch's row has no place in
            transformers' and is dropped. Logits are compared where attention_mask is 1.

    Noise is what low precision changes in `a`: the absolute difference between a's gradients, or logits, in float32 and
    in its low precision. If `a` holds bfloat16 or float16 tensors, or autocast is on, that is its own run against one
    with these tensors widened for the moment and autocast off; if it is float32 throughout, against one under bfloat16
    autocast. No tensor's noise counts as less than one rounding (eps / 2) of its largest, for the mean of its mean,
    element. The loss is one number, in which errors cancel by luck; its noise is the mean over the trained tokens of
    the change of each token's loss.

    Both models run in training mode, as that is what computes gradients, with every dropout set to 0. Parameters, their
    .grad, modes, dropout and torch's generators are left as they were. The gradients and logits of two runs are in
    memory at a time. Raises ValueError for a batch without labels, of padding alone, or with padding that this
    package's models cannot be told of; TypeError for a batch of another kind.
    """
    batch = as_mapping(batch)
    with torch.random.fork_rng():
        own = run(a, batch)
        low = low_precision(a)
        other_way = in_float32(a) if low else torch.autocast(batch["input_ids"].device.type, torch.bfloat16)
        with other_way:
            other = run(a, batch)
        noise = compare(own, other, own.gradients.keys() & other.gradients.keys(), torch.finfo(low or torch.bfloat16))
        noise["loss"] = (token_loss_change(own.logits, other.logits, batch),) * 2
        del other
        if not isinstance(b, nn.Module):
            made = b(a)
            b = made if isinstance(made, nn.Module) else a
        theirs = run(b, batch)
    shared = [name for name in own.gradients if name in theirs.gradients]
    found = compare(own, theirs, shared)
    found["loss"] = (abs(own.loss - theirs.loss),) * 2
    return Comparison(
        logits=Row(*found["logits"], *noise["logits"]),
        loss=Row(*found["loss"], *noise["loss"]),
        gradients={name: Row(*found[name], *noise[name]) for name in shared},
        losses=(own.loss, theirs.loss),
        dtype=low or torch.bfloat16,
        unmatched=sorted(own.gradients.keys() ^ theirs.gradients.keys()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# One run


class Run(NamedTuple):
    logits: Tensor  # (n, V), of the n tokens that are not padding
    loss: float
    gradients: dict[str, Tensor]  # zeros where a tensor received none


def run(model: nn.Module, batch: dict) -> Run:
    """Forward and backward once. The gradients are taken out of .grad, which gets back what it held."""
    torch.manual_seed(0)
    trainable = {shared_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.grad for name, p in trainable.items()}
    with torch.enable_grad(), training_without_dropout(model):
        try:
            for p in trainable.values():
                p.grad = None
            loss, logits = (call_ours if callable(getattr(model, "loss", None)) else call_transformers)(model, batch)
            if trainable:
                loss.backward()
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}
        finally:
            for name, p in trainable.items():
                p.grad = before[name]
    kept = batch.get("attention_mask")
    logits = logits.flatten(0, 1) if kept is None else logits[kept.bool()]
    return Run(logits, loss.item(), gradients)


def call_transformers(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    batch = {"use_cache": False} | batch  # beside a cache, restarting positions would not keep packed sequences apart
    out = model(**batch)
    if out.logits is not None and out.logits.dim() == 3 and out.logits.shape[1] == batch["input_ids"].shape[1]:
        return out.loss, out.logits.detach()
    with torch.no_grad():  # a fused loss keeps no logits
        return out.loss, model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def call_ours(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    tokens, labels = batch["input_ids"], shifted(batch)
    kept, positions = batch.get("attention_mask"), batch.get("position_ids")
    if kept is not None and (kept[:, 1:] > kept[:, :-1]).any():
        raise ValueError("verify: attention_mask must have its zeros on the right for this package's models")
    places = {"positions": positions[0]} if positions is not None and len(positions) == 1 else {"positions": positions}
    if positions is not None and len(tokens) == 1:
        starts = (positions[0] == 0).nonzero().flatten()
        places["cu_seqlens"] = F.pad(starts, (0, 1), value=tokens.shape[1]).to(torch.int32)
    with torch.no_grad():
        logits = model(tokens, **places)
    return model.loss(tokens, labels, **places), logits


def as_mapping(batch) -> dict[str, Tensor]:
    """Any kind of batch as transformers' models take it."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch, "labels": batch}
    if isinstance(batch, Batch):
        made = {"input_ids": batch.tokens, "labels": F.pad(batch.labels[:, :-1], (1, 0), value=IGNORED)}
        return made if batch.positions is None else made | {"position_ids": batch.positions[None]}
    if not isinstance(batch, Mapping):
        raise TypeError(f"verify: batch must be a dict, a Batch or tokens, got {type(batch).__name__}")
    for name in ("input_ids", "labels"):
        if batch.get(name) is None:
            raise ValueError(f"verify: batch must hold input_ids and labels, got {sorted(batch)}")
    if batch.get("attention_mask") is not None and not batch["attention_mask"].any():
        raise ValueError("verify: batch must hold a token that is not padding, got none")
    return dict(batch)


def shifted(batch: dict) -> Tensor:
    """labels[b, t] is the target at position t."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def shared_name(name: str) -> str:
    """One name for a tensor, however PEFT, DDP, torch.compile or transformers wrapped the model that holds it."""
    name = name.replace("_orig_mod.", "")
    name = re.sub(r"^(base_model\.model\.|module\.|model\.)+", "", name)
    name = re.sub(r"lora_([AB])\.default\.weight$", lambda m: f"lora_{m[1].lower()}", name)
    return name.replace(".base_layer.", ".").replace(".base.", ".")


# ---------------------------------------------------------------------------------------------------------------------
# How a model runs


def low_precision(model: nn.Module) -> torch.dtype | None:
    """The low precision that `model` runs in: autocast's, or that of its tensors. None for float32."""
    for device in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    dtypes = {t.dtype for t in (*model.parameters(), *model.buffers())}
    dtypes |= {getattr(m, "compute_dtype", None) for m in model.modules()}  # bitsandbytes' linears
    return next((dtype for dtype in LOW if dtype in dtypes), None)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """For the moment every bfloat16 and float16 tensor of the model is float32, and autocast is off."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in LOW]
    kept = [t.data for t in tensors]
    with ExitStack() as stack:
        for device in {p.device.type for p in model.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for m in model.modules():
            if getattr(m, "compute_dtype", None) in LOW:
                stack.enter_context(replaced(m, "compute_dtype", torch.float32))
        held = [t.grad for t in tensors]
        try:
            for t in tensors:
                t.grad = None
                t.data = t.data.float()
            yield
        finally:
            for t, data, grad in zip(tensors, kept, held, strict=True):
                t.data = data
                t.grad = grad


@contextmanager
def training_without_dropout(model: nn.Module) -> Iterator[None]:
    """For the moment the model trains, and every dropout is 0: the masks of two implementations are never the same."""
    with ExitStack() as stack:
        for m in model.modules():
            stack.enter_context(replaced(m, "training", True))
            names = ("p",) if isinstance(m, nn.modules.dropout._DropoutNd) else ("dropout", "attention_dropout")
            for name in names:
                if isinstance(getattr(m, name, None), float):
                    stack.enter_context(replaced(m, name, 0.0))
        yield


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def compare(ours: Run, theirs: Run, names, rounding: torch.finfo | None = None) -> dict[str, tuple[float, float]]:
    """(worst, mean) difference of the logits and of the named gradients; with `rounding`, at least one rounding."""
    pairs = {"logits": (ours.logits, theirs.logits)}
    pairs |= {name: (ours.gradients[name], theirs.gradients[name]) for name in names}
    return {name: difference(x, y, rounding) for name, (x, y) in pairs.items()}


def nan_is_most(x: float) -> float:
    return math.inf if math.isnan(x) else x


def difference(x: Tensor, y: Tensor, rounding: torch.finfo | None = None) -> tuple[float, float]:
    if x.shape != y.shape:
        raise ValueError(f"verify: models must have equal shapes, got {list(x.shape)} and {list(y.shape)}")
    chunks = zip(x.flatten().split(CHUNK), y.flatten().split(CHUNK), strict=True)
    found = torch.stack([extent(u.float(), u.float() - v.float()) for u, v in chunks])
    (worst, largest), (total, size) = found[:, :2].amax(0).tolist(), found[:, 2:].sum(0).tolist()
    once = rounding.eps / 2 if rounding else 0.0
    return max(worst, largest * once), max(total, size * once) / x.numel()


def extent(x: Tensor, d: Tensor) -> Tensor:
    """Largest |d| and |x|, sum of |d| and of |x|, as four float64 numbers; nan and infinity come through."""
    return torch.stack(
        [
            d.abs().max().double(),
            x.abs().max().double(),
            d.abs().sum(dtype=torch.float64),
            x.abs().sum(dtype=torch.float64),
        ]
    )


def token_loss_change(x: Tensor, y: Tensor, batch: dict) -> float:
    """Mean over the trained tokens of |change of the token's loss| between logits x and y (n, V)."""
    labels, kept = shifted(batch), batch.get("attention_mask")
    labels = labels.flatten() if kept is None else labels[kept.bool()]
    rows = (labels != IGNORED).nonzero().flatten()
    total = 0.0
    for some in rows.split(max(1, CHUNK // x.shape[1])):
        lost = [F.cross_entropy(logits[some].float(), labels[some], reduction="none") for logits in (x, y)]
        total += (lost[0] - lost[1]).abs().sum().item()
    return total / max(1, len(rows))
