"""Generation on random weights: the prompt at once, then one token at a time against the cache."""

import argparse

import torch

from llamakern.bench.clock import captured
from llamakern.bench.models import preset, random_model
from llamakern.bench.step import matmul_weights
from llamakern.bench.table import Table
from llamakern.decoding import decoder
from llamakern.model import KVCache

ABSENT = "benchmarks/bench_generate.py of a checkout races it on the same shapes"


def run(table: Table, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Two rows, prefill and decode. `method` qlora means a base of 4 bits, another a dense one."""
    config, T, B = preset(arguments), arguments.tokens, arguments.batch
    nf4 = arguments.method == "qlora"
    model = random_model(config, dtype, nf4=nf4, double_quant=arguments.double_quant, head=arguments.quantize_head)
    model.eval().requires_grad_(False)
    cache, tokens = model.new_cache(B, T + 1), torch.randint(0, config.vocab_size, (B, T))
    one_more = decoder(model, cache)
    shape = f"{arguments.preset} {'nf4' if nf4 else 'dense'} layers={config.n_layers}" + f" batch={B}" * (B > 1)
    contestants = {"transformers": ABSENT, "llama.cpp": ABSENT}
    weight_bytes = read_bytes(model)
    attended = 2 * config.n_layers * config.n_heads * config.head_dim

    @torch.inference_mode()
    def prefill():
        rewind(cache, 0)
        model.lm_head(model.hidden(tokens, cache=cache)[:, -1])

    @torch.inference_mode()
    def decode():
        rewind(cache, T)
        model.lm_head(one_more(tokens[:, 0]))

    body = matmul_weights(config) - config.dim * config.vocab_size
    table.row(
        f"{shape} prefill tokens={T}",
        {"ours": prefill, **contestants},
        flops=B * (2 * T * body + 2 * config.dim * config.vocab_size + attended * T * (T + 1)),
        bytes_moved=weight_bytes,
        dtype=dtype,
        facts={"tokens": B * T},
    )
    table.row(
        f"{shape} decode after tokens={T}",
        {"ours": decode, **captured(decode), **contestants},
        flops=B * (2 * matmul_weights(config) + 2 * attended * T),
        bytes_moved=weight_bytes + B * 2 * config.n_layers * config.n_kv_heads * config.head_dim * T * dtype.itemsize,
        dtype=dtype,
        facts={"tokens": B},
    )


def rewind(cache: KVCache, length: int) -> None:
    cache.used = length
    cache.lengths.fill_(length)


def read_bytes(model) -> int:
    """Of all weights that a token is multiplied with: the embedding's rows are looked up."""
    tied = model.lm_head.weight is model.embed_tokens.weight
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else model.embed_tokens.weight.nbytes)
