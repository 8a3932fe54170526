"""LLaMA kernels and runtime: torch ops in `ops`, models, LoRA and QLoRA in `peft`, a trainer, generation.

>>> model = llamakern.Llama.from_pretrained("path/to/llama", quantize="nf4")
>>> llamakern.peft.apply(model, llamakern.peft.LoRAConfig(rank=16))
"""

import importlib

from llamakern import _library as _library  # isort: skip  registers torch.ops.llamakern.*, before _C needs its library
from llamakern import _C as _C
from llamakern import nn as nn
from llamakern import ops as ops
from llamakern import peft as peft
from llamakern.config import LlamaConfig as LlamaConfig
from llamakern.generation import generate as generate
from llamakern.model import Llama as Llama
from llamakern.nn import quantize_ as quantize_
from llamakern.tokenizer import load_tokenizer as load_tokenizer
from llamakern.train import TrainConfig as TrainConfig
from llamakern.train import Trainer as Trainer

_LAZY = {  # name -> module: what is imported only where it is asked for; patch needs transformers
    "check_training": "llamakern.gate",
    "patch": "llamakern.integrations.transformers",
    "unpatch": "llamakern.integrations.transformers",
    "verify": "llamakern.comparison",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llamakern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
