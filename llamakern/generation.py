"""Generation: prefill once, then one token at a time against the cache.

Shapes: B rows, T tokens of the longest prompt, V vocabulary.
"""

import torch
from torch import Tensor


def generate(
    model,
    tokens: Tensor,  # (B, T) integer
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,  # (B,)
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    stop: str | tuple[str, ...] | None = None,
    tokenizer=None,
    pad_id: int = 0,
    on_token=None,
) -> Tensor:  # (B, T + new) int64
    """Continues each row. `new` is max_new_tokens, or less if every row has ended before.

    lengths: rows are padded on the right and row b's prompt has lengths[b] tokens; its new ones follow directly, and
    pad_id fills the rest. temperature 0 takes the most likely token; otherwise one is drawn from
    softmax(logits / temperature), among the top_k likeliest, and among the fewest whose probabilities reach top_p.
    The same seed draws the same tokens. A row ends with eos_id, or when its new text contains a `stop` string
    (which needs the tokenizer). on_token(ids) sees each step's B new ids as a list, None for a row that has ended.

    ValueError for sizes and knobs out of range.
    """
    B, T = _check(tokens, lengths, max_new_tokens, temperature, top_k, top_p, stop, tokenizer)
    device = tokens.device
    lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device, torch.int64)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)

    real = torch.arange(T, device=device) < lengths[:, None]
    out = torch.full((B, T + max_new_tokens), pad_id, dtype=torch.int64, device=device)
    out[:, :T] = torch.where(real, tokens, pad_id)
    if B == 0 or max_new_tokens == 0:
        return out
    rows, made = torch.arange(B, device=device), 0
    done = torch.zeros(B, dtype=torch.bool, device=device)
    with torch.inference_mode(), evaluating(model):
        cache = model.new_cache(B, T + max_new_tokens)
        h = model.hidden(out[:, :T], cache=cache, lengths=lengths)[rows, lengths - 1]  # (B, C)
        while True:
            step = pick(model.lm_head(h), temperature, top_k, top_p, generator)  # (B,)
            step = torch.where(done, pad_id, step)
            out[rows, lengths + made] = torch.where(done, out[rows, lengths + made], step)
            made += 1
            if on_token is not None:
                on_token([None if over else i for i, over in zip(step.tolist(), done.tolist(), strict=True)])
            if ends:
                done |= torch.isin(step, torch.tensor(ends, device=device))
            if stop:
                done |= _stopped(out, lengths, made, stop, tokenizer)
            if made == max_new_tokens or ((ends or stop) and bool(done.all())):
                break
            h = model.hidden(step[:, None], cache=cache)[:, -1]
    return out[:, : T + made].clone()


def pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator=None) -> Tensor:
    """One token id per row of logits (B, V)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = torch.softmax(restrict(logits.float() / temperature, top_k, top_p), -1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, V) with -inf for all but the top_k, and then for all but the fewest that reach top_p."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, where = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        out = p.cumsum(-1) - p >= top_p  # reached before this one
        logits = logits.masked_fill(out.scatter(-1, where, out), -torch.inf)
    return logits


class evaluating:
    """Holds a model in eval mode, so that dropout is off, and gives each module its own mode back."""

    def __init__(self, model):
        self.training = [m for m in model.modules() if m.training]

    def __enter__(self):
        for m in self.training:
            m.training = False

    def __exit__(self, *_):
        for m in self.training:
            m.training = True


def _stopped(out: Tensor, lengths: Tensor, made: int, stop: tuple[str, ...], tokenizer) -> Tensor:
    """Which rows' new text ends in a stop string, or contains one within its last token."""
    # A token holds at least one byte; one more in front, since decoders drop a space at the very start.
    tail = max(len(s.encode()) for s in stop) + 1
    texts = []
    for row, n in zip(out, lengths.tolist(), strict=True):
        ids = row[n + max(0, made - tail) : n + made].tolist()
        texts.append(tokenizer.decode(ids))
    return torch.tensor([any(s in text for s in stop) for text in texts], device=out.device)


def _check(tokens, lengths, max_new_tokens, temperature, top_k, top_p, stop, tokenizer) -> tuple[int, int]:
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"generate: tokens must have shape (B, T) with T > 0, got {list(tokens.shape)}")
    B, T = tokens.shape
    if lengths is not None and (tuple(lengths.shape) != (B,) or bool(((lengths < 1) | (lengths > T)).any())):
        raise ValueError(f"generate: lengths must be {B} numbers from 1 to {T}, got {lengths.tolist()}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if stop is not None and tokenizer is None:
        raise ValueError("generate: tokenizer must be given with stop, got None")
    return B, T
