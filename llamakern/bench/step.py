"""A whole training step on random weights: forward, loss, backward, clipping, AdamW, as the trainer takes it."""

import argparse

import torch
from torch import nn

from llamakern import peft
from llamakern.bench.models import preset, random_model
from llamakern.bench.table import Table
from llamakern.data import Example
from llamakern.runs import peak_memory_mb, reset_peak_memory
from llamakern.train import TrainConfig, Trainer

ABSENT = "benchmarks/bench_train.py of a checkout races it on the same shapes"


def run(table: Table, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """One row. Memory is the process's peak in a step, and what it adds to that of the idle model by token."""
    config = preset(arguments)
    trainer = make_trainer(config, arguments, dtype)
    batches = next(trainer.plan(0))

    def step():
        trainer.backward(batches)
        nn.utils.clip_grad_norm_(trainer.trainable.values(), trainer.config.clip)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    reset_peak_memory()
    idle = peak_memory_mb()
    step()  # the optimizer's state and the kernels' buffers stay from here on
    reset_peak_memory()
    step()
    peak, tokens = peak_memory_mb(), sum(batch.tokens.numel() for batch in batches)
    shape = f"{arguments.preset} {arguments.method} layers={config.n_layers} tokens={tokens}"
    table.row(
        shape + f" batch={arguments.batch}" * (arguments.batch > 1) + " checkpoint" * arguments.checkpoint_activations,
        {"ours": step, "transformers + PEFT": ABSENT},
        flops=step_flops(config, tokens, arguments.batch, arguments.method),
        dtype=dtype,
        facts={
            "tokens": tokens,
            "memory_mb": peak,
            "bytes_per_token": (peak - idle) * 2**20 / tokens,
            "weights_mb": sum(p.nbytes for p in trainer.model.parameters()) / 2**20,
        },
    )


def make_trainer(config, arguments, dtype: torch.dtype) -> Trainer:
    model = random_model(config, dtype, nf4=arguments.method == "qlora", double_quant=arguments.double_quant,
                         head=arguments.quantize_head)  # fmt: skip
    if arguments.method != "full":
        lora = peft.LoRAConfig(rank=arguments.rank, alpha=2 * arguments.rank)
        peft.apply(model, peft.AdapterConfig() if arguments.method == "adapter" else lora)
    model.checkpoint_activations = arguments.checkpoint_activations
    length = arguments.tokens // arguments.batch + 1  # of the last token only the label counts
    if length < 2:
        raise ValueError(f"bench: tokens must be at least batch, got {arguments.tokens} and {arguments.batch}")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (arguments.batch, length), generator=generator, device="cpu").tolist()
    examples = [Example(row, [True] * length, False, "random tokens") for row in rows]
    settings = TrainConfig(batch_size=arguments.batch, steps=1, max_len=length, packing=False, lr=1e-4,
                           checkpoint_activations=arguments.checkpoint_activations)  # fmt: skip
    return Trainer(model.train(), examples, settings, quiet=True)


def step_flops(config, tokens: int, batch: int, method: str) -> int:
    """What the formulas need. Frozen weights have no dw; a method's own matmuls and recomputation are left out.

    That the lowest layers of LLaMA-Adapter have no backward is left out too.
    """
    linears = matmul_weights(config)
    attention = config.n_layers * config.n_heads * config.head_dim * (tokens // batch)  # causal: half of two matmuls
    passes = 3 if method == "full" else 2
    return tokens * (passes * 2 * linears + 7 * attention)  # attention's backward is five such halves


def matmul_weights(config) -> int:
    """Weights that every token is multiplied with."""
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    return config.n_layers * config.dim * (heads + 3 * config.hidden_dim) + config.dim * config.vocab_size
