"""Parameter-efficient fine-tuning: one file per method, each a dataclass that plugs modules into a model's sockets.

`METHODS` lists them by the name that `finetune --method` takes; `base` says what a method is and how several compose.
"""

from collections.abc import Sequence

from torch import nn

from llamakern.peft.adapter import AdapterConfig
from llamakern.peft.adapter_v2 import AdapterV2Config
from llamakern.peft.base import Method, Parts, count_trainable, trainable
from llamakern.peft.excitor import ExcitorConfig
from llamakern.peft.expert_lora import ExpertLoRAConfig
from llamakern.peft.files import load, save
from llamakern.peft.full import FullConfig
from llamakern.peft.lora import LoRAConfig
from llamakern.peft.merge import MergeReport, logit_change, merge, merge_report
from llamakern.peft.methods import METHODS, find_method, register
from llamakern.peft.official_v1 import load_official_v1, save_official_v1
from llamakern.peft.official_v2 import load_official_v2
from llamakern.peft.prompt import PromptConfig
from llamakern.peft.switching import activate, active, adapters, add, remove


def apply(model: nn.Module, config: Method | Sequence[Method], *, name: str = "default") -> nn.Module:
    """The model itself, with the method of `config`, or several, in it under `name`, active, and all else frozen.

    Several are attached by their `order`, whatever order they are given in. ValueError if the model carries an adapter
    of that name, or if a method does not fit the model or the others.
    """
    add(model, name, [config] if isinstance(config, Method) else list(config))
    return model


__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterV2Config",
    "ExcitorConfig",
    "ExpertLoRAConfig",
    "FullConfig",
    "LoRAConfig",
    "MergeReport",
    "Method",
    "Parts",
    "PromptConfig",
    "activate",
    "active",
    "adapters",
    "apply",
    "count_trainable",
    "find_method",
    "load",
    "load_official_v1",
    "load_official_v2",
    "logit_change",
    "merge",
    "merge_report",
    "register",
    "remove",
    "save",
    "save_official_v1",
    "trainable",
]
