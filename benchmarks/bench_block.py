"""A decoder block for the newest token: one call against the calls of its ops, over NF4 weights."""

import torch
from random_llama import Shape, make_model
from timing import Table

from llamakern.decoding import decoder

SHAPES = {
    "tinyllama-1.1b": Shape(layers=4, V=256),
    "llama3-8b": Shape(C=4096, FFN=14336, layers=2, H=32, Hkv=8, V=256),
}
S = 512  # keys in the cache


def main():
    table = Table("block")
    for name, shape in SHAPES.items():
        for B in (1, 4):
            model = make_model(shape, S)
            table.row(f"{name} B={B} S={S}", contestants(model, B), bytes_moved=shape.weights() * 9 // 16)
    table.done()


def contestants(model, B: int) -> dict:
    """One token through all layers, and the cache as it was."""
    cache = model.new_cache(B, S)
    cache.grow(S - 1)
    tokens = torch.zeros(B, dtype=torch.int64)

    def running(step):
        def run():
            with torch.inference_mode():
                step(tokens)
                cache.grow(-1)

        return run

    return {
        "one call": running(decoder(model, cache)),
        "its ops": running(lambda tokens: model.hidden(tokens[:, None], cache=cache)),
    }


if __name__ == "__main__":
    main()
