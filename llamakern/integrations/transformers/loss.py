"""The loss of a causal LLaMA without its logits: the forward that `patch` gives to LlamaForCausalLM.

    z = h W_headᵀ        loss = Σ_t (logsumexp(z_t) - z_t[label_{t+1}]) / n

n is the number of labels that are not ignored, or num_items_in_batch.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from llamakern import ops
from llamakern.integrations.transformers.llama import is_watched
from llamakern.ops._door import autocast_dtype

STATE = "_llamakern"  # what `patch` keeps on a model: its attention before, and whether the loss is fused


@dataclass
class LateLogits(CausalLMOutputWithPast):
    """CausalLMOutputWithPast whose logits are computed where they are first asked for: `late()` gives them.

    `late` is a field, so that it survives those who take an output apart and build it anew.
    """

    late: Callable[[], Tensor] | None = None

    def __post_init__(self):
        late, self.late = self.late, None  # what follows reads every field
        super().__post_init__()
        if late is not None:
            self["late"] = late

    @property
    def logits(self) -> Tensor | None:
        late = vars(self).get("late")
        if late is not None:
            self.late = None
            OrderedDict.__delitem__(self, "late")
            self.logits = late()
        return vars(self).get("logits")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        vars(self)["logits"] = value
        if value is not None:
            OrderedDict.__setitem__(self, "logits", value)
            for key in [key for key in self.keys() if key not in ("loss", "logits")]:
                self.move_to_end(key)  # the usual order of the fields

    def __getitem__(self, key):
        if key != "loss":
            _ = self.logits
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        _ = self.logits
        return super().to_tuple()


def with_fused_loss(cls: type[nn.Module]) -> Callable:
    """The forward of a causal LLaMA class that in training computes the loss by `ops.linear_cross_entropy`.

    That is where labels are given, the model trains and gradients are recorded. Then `logits` of what it returns are
    computed only if they are read; under torch.compile they are None. Every other call is the class's own.
    """
    original = cls.forward
    names = [name for name in inspect.signature(original).parameters if name not in ("self", "kwargs")]

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if not wanted(self, kwargs) or why_not(self):
            return original(self, **kwargs)
        labels = kwargs.pop("labels")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("logits_to_keep", "return_dict")}
        outputs = self.model(**kwargs)
        h = outputs.last_hidden_state
        loss = next_token_loss(h, self.lm_head.weight, labels, **kwargs)
        fields = {key: outputs.get(key) for key in ("past_key_values", "hidden_states", "attentions")}
        if torch.compiler.is_compiling():
            return CausalLMOutputWithPast(loss=loss, **fields)
        return LateLogits(loss=loss, late=later(self.lm_head, h), **fields)

    return forward


def later(head: nn.Linear, h: Tensor) -> Callable[[], Tensor]:
    """The logits of h as the head gives them now, whenever asked for; RuntimeError once a step has moved it."""
    dtype, weight = autocast_dtype(h), head.weight
    version = weight._version

    def logits() -> Tensor:
        if weight._version != version:
            raise RuntimeError(
                "patch: logits must be read before the optimizer's step, got a changed lm_head; "
                "patch(model, loss=False) computes them at once"
            )
        with torch.autocast(h.device.type, dtype=dtype, enabled=dtype is not None):
            return head(h)

    return logits


def wanted(model: nn.Module, kwargs: dict) -> bool:
    """Whether a call is a training step that needs every logit for its loss alone."""
    keep, as_dict = kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
    return (
        getattr(model, STATE, {}).get("loss")
        and model.training
        and torch.is_grad_enabled()
        and kwargs.get("labels") is not None
        and isinstance(keep, int)
        and keep == 0
        and (model.config.return_dict if as_dict is None else as_dict)
    )


def why_not(model: nn.Module) -> str | None:
    """What stands against computing the loss from the head's weight, or None."""
    head = model.lm_head
    if type(head) is not nn.Linear:
        return f"lm_head is {type(head).__name__}, not a plain Linear"
    if head.bias is not None:
        return "lm_head has a bias"
    if is_watched(head):
        return "lm_head has hooks or a forward of its own"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None


def next_token_loss(
    h: Tensor,  # (B, T, C)
    w_head: Tensor,  # (V, C)
    labels: Tensor,  # (B, T) int64
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # (B, T) int64
    **kwargs,
) -> Tensor:  # () float32
    """transformers' ForCausalLMLoss: the mean over what is not ignored, or the sum over num_items_in_batch."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    dtype = autocast_dtype(h)
    if dtype is not None:
        h, w_head = h.to(dtype), w_head.to(dtype)
    shift_labels = shift_labels.to(h.device).reshape(h.shape[:-1])
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.linear_cross_entropy(h, w_head, shift_labels, ignore_index=ignore_index, reduction=reduction)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
