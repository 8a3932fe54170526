"""Prompt tuning (arXiv 2104.08691): P trained embeddings in front of every sequence, all else frozen.

They are tokens like any others to the layers: positions 0 to P - 1, causal, in the cache. No label stands at them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llamakern.model import Llama
from llamakern.peft.base import Method, Parts, like

INITS = ("vocab", "normal")
# Settings of PEFT's file that describe the model or the start, and change nothing of a trained prompt.
THEIRS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "num_attention_heads", "num_layers", "peft_type",
    "peft_version", "prompt_tuning_init", "prompt_tuning_init_text", "revision", "task_type", "token_dim",
    "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip


@dataclass(frozen=True)
class PromptConfig(Method):
    """Virtual tokens before every sequence.

    prompt_len    P
    init          "vocab": embeddings of tokens drawn from the vocabulary (section 3.2 there); "normal": N(0, init_std²)
    init_tokens   ids whose embeddings are the start, repeated or cut to P; overrides init

    Training starts near the base, not at it. ValueError for a P below 1, an unknown init or an id that is none.
    """

    kind: ClassVar[str] = "prompt"
    order: ClassVar[int] = 60
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_len: int = 20
    init: str = "vocab"
    init_std: float = 0.02
    init_tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        if type(self.prompt_len) is not int or self.prompt_len < 1:
            raise ValueError(f"prompt: prompt_len must be a positive integer, got {self.prompt_len!r}")
        if self.init not in INITS:
            raise ValueError(f"prompt: init must be one of {list(INITS)}, got {self.init!r}")
        if self.init_tokens is not None and not self.init_tokens:
            raise ValueError("prompt: init_tokens must hold at least one id, got none")

    def attach(self, model: nn.Module) -> Parts:
        if not isinstance(model, Llama):
            raise ValueError(f"prompt: model must be a llamakern.Llama, got {type(model).__name__}")
        table, P = model.embed_tokens.weight, self.prompt_len
        V, C = table.shape
        if self.init_tokens is not None and not all(0 <= i < V for i in self.init_tokens):
            raise ValueError(f"prompt: init_tokens must be ids from 0 to {V - 1}, got {list(self.init_tokens)}")
        if self.init_tokens is None and self.init == "normal":
            return Parts(
                parameters={"prefix": nn.Parameter(torch.empty(P, C, **like(model)).normal_(std=self.init_std))}
            )
        drawn = torch.randint(V, (P,)) if self.init_tokens is None else torch.tensor(self.init_tokens)
        rows = drawn[torch.arange(P) % len(drawn)].to(table.device)
        return Parts(parameters={"prefix": nn.Parameter(table.detach()[rows].float())})

    # -----------------------------------------------------------------------------------------------------------------
    # PEFT's files: prompt_embeddings (P, C)

    def describe(self) -> dict:
        about = {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
        return about | {"num_virtual_tokens": self.prompt_len, "num_transformer_submodules": 1}

    @classmethod
    def read(cls, settings: Mapping) -> "PromptConfig":
        for key, value in settings.items():
            mine = key == "num_virtual_tokens" or (key == "num_transformer_submodules" and value == 1)
            if not (mine or key in THEIRS or value in (None, False)):
                raise ValueError(f"peft: adapter_config.json asks for {key} = {value!r}, which is not supported")
        return cls(prompt_len=settings.get("num_virtual_tokens"))

    def pack(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {"prompt_embeddings": tensors["model.prefix"]}

    def unpack(self, saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {"model.prefix": saved["prompt_embeddings"]}
