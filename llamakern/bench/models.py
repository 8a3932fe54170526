"""Models of random weights: what a step or a token costs does not depend on the weights' values."""

import argparse

import torch
from torch import nn

from llamakern.config import PRESETS, LlamaConfig
from llamakern.model import Llama
from llamakern.nn import NF4Linear, large_pages_


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `bench step` and `bench generate`."""
    parser.add_argument("--preset", choices=PRESETS, default="llama3.2-1b", metavar="NAME", help="sizes (%(default)s)")
    parser.add_argument("--layers", type=int, help="so many of the preset's")
    parser.add_argument(
        "--method", choices=("qlora", "lora", "adapter", "full"), default="qlora", help="of step (%(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (%(default)s)")
    parser.add_argument("--double-quant", action="store_true", help="quantise the scales too")
    parser.add_argument("--quantize-head", action="store_true", help="lm_head in 4 bits too")
    parser.add_argument("--checkpoint-activations", action="store_true", help="of step: compute blocks again")
    parser.add_argument("--tokens", type=int, default=512, help="of a step, or of the prompt (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences that share them, or rows (%(default)s)")


def preset(arguments: argparse.Namespace) -> LlamaConfig:
    """The configuration asked for. ValueError for a depth that the preset has not."""
    config = LlamaConfig.preset(arguments.preset)
    layers = config.n_layers if arguments.layers is None else arguments.layers
    if not 1 <= layers <= config.n_layers:
        raise ValueError(f"bench: layers must lie in 1 to {config.n_layers} for {arguments.preset}, got {layers}")
    return config.replace(n_layers=layers)


def random_model(config: LlamaConfig, dtype: torch.dtype, *, nf4: bool, double_quant=False, head=False) -> Llama:
    """Random weights, the linears as NF4 bytes if asked; nothing is ever larger than the model itself."""
    with torch.device("meta"):
        model = Llama(config)
    for parent in model.modules():
        for name, child in parent.named_children():
            if nf4 and type(child) is nn.Linear and (head or name != "lm_head"):
                setattr(parent, name, random_nf4(child.in_features, child.out_features, double_quant))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                filled = torch.ones(p.shape, dtype=dtype)
                filled = filled if p.dim() == 1 else filled.normal_(std=0.02)
                setattr(module, name, nn.Parameter(filled))
    if type(model.lm_head) is nn.Linear:
        model.tie_weights()
    large_pages_(model)
    return model


def random_nf4(K: int, N: int, double_quant: bool) -> NF4Linear:
    made = NF4Linear(K, N, double_quant=double_quant)
    made.weight.data.view(torch.int64).random_()
    if double_quant:
        made.absmax.data.random_(0, 256)
        made.absmax_scale.data.fill_(0.01)
        made.absmax_offset.data.fill_(0.03)
    else:
        made.absmax.data.uniform_(0.03, 0.04)
    return made
