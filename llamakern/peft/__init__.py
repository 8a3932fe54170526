"""Parameter-efficient fine-tuning: one file per method, each a dataclass whose `apply` plugs modules into the sockets.

`METHODS` lists them by the name that `finetune --method` takes. qlora is LoRA over a base quantised to NF4.
"""

from torch import nn

from llamakern.peft.adapters import activate, active, adapters, remove
from llamakern.peft.base import count_trainable, trainable
from llamakern.peft.files import load, save
from llamakern.peft.lora import LoRAConfig
from llamakern.peft.merge import MergeReport, logit_change, merge, merge_report

METHODS = {"lora": LoRAConfig, "qlora": LoRAConfig}


def apply(model: nn.Module, config, *, name: str = "default") -> nn.Module:
    """The model itself, with the method of `config` in it under `name`, active, and all else frozen.

    ValueError if the model carries an adapter of that name.
    """
    config.apply(model, name)
    return model


__all__ = [
    "METHODS",
    "LoRAConfig",
    "MergeReport",
    "activate",
    "active",
    "adapters",
    "apply",
    "count_trainable",
    "load",
    "logit_change",
    "merge",
    "merge_report",
    "remove",
    "save",
    "trainable",
]
