"""A decoder block for the newest token of each row: one call against those of its ops, over NF4 weights."""

import torch

from llamakern.bench.cases import Case
from llamakern.bench.clock import relative_error
from llamakern.bench.models import random_model
from llamakern.config import LlamaConfig
from llamakern.decoding import decoder
from llamakern.model import KVCache

COLD = 256 << 20  # bytes of blocks that take turns: no cache holds them


def rows(table, label, dtype, *, C, H, Hkv, FFN, S, B=1):
    kv = Hkv * C // H
    parameters = C * (2 * C + 2 * kv + 3 * FFN)
    bytes_each = parameters * 9 // 16 + B * 2 * kv * S * dtype.itemsize
    layers = max(2, -(-COLD // bytes_each))
    config = LlamaConfig(dim=C, n_layers=layers, n_heads=H, n_kv_heads=Hkv, hidden_dim=FFN, vocab_size=8)
    model = random_model(config, dtype, nf4=True).eval().requires_grad_(False)
    cache, tokens = model.new_cache(B, S), torch.zeros(B, dtype=torch.int64)
    for t in cache.k + cache.v:
        t.normal_()
    contestants = {
        "ours": running(decoder(model, cache), cache, tokens),
        "its ops": running(lambda tokens: model.hidden(tokens[:, None], cache=cache)[:, -1], cache, tokens),
    }
    table.row(
        f"{label} x{layers}",
        contestants,
        flops=layers * B * (2 * parameters + 4 * S * C),
        bytes_moved=layers * bytes_each,
        error=relative_error(*(run() for run in contestants.values())),
        dtype=dtype,
    )


def running(step, cache: KVCache, tokens: torch.Tensor):
    """One token through all blocks, at the last place of the cache, to what lm_head would see."""

    def run():
        with torch.inference_mode():
            cache.used = cache.k[0].shape[1] - 1
            cache.lengths.fill_(cache.used)
            return step(tokens)

    return run


CASES = (
    Case(
        "nf4_block_decode_",
        rows,
        {
            "tinyllama-1.1b S=512": {"C": 2048, "H": 32, "Hkv": 4, "FFN": 5632, "S": 512},
            "tinyllama-1.1b S=512 B=4": {"C": 2048, "H": 32, "Hkv": 4, "FFN": 5632, "S": 512, "B": 4},
            "llama3-8b S=2048": {"C": 4096, "H": 32, "Hkv": 8, "FFN": 14336, "S": 2048},
        },
        (torch.bfloat16,),
    ),
)
