"""Generation: prefill once, then one token at a time against the cache.

Shapes: B rows, T tokens of the longest prompt, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llamakern.decoding import decoder


def generate(
    model,
    tokens: Tensor,  # (B, T) integer
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,  # (B,)
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    stop: str | tuple[str, ...] | None = None,
    tokenizer=None,
    pad_id: int = 0,
    on_token=None,
    features: Tensor | None = None,  # (B, Nv, Dv)
) -> Tensor:  # (B, T + new) int64
    """Continues each row. `new` is max_new_tokens, or less if every row has ended before.

    lengths: rows are padded on the right and row b's prompt has lengths[b] tokens; its new ones follow directly, and
    pad_id fills the rest. temperature 0 takes the most likely token; otherwise one is drawn from
    softmax(logits / temperature): among the top_k likeliest, the fewest whose probabilities reach top_p, and those of
    at least min_p times the greatest. repetition_penalty divides the positive and multiplies the negative logits of
    tokens that the row has already (CTRL, arXiv 1909.05858, section 4.1). The same seed draws the same tokens.

    A row ends with eos_id, or when its new text contains a `stop` string (which needs the tokenizer). on_token(ids)
    sees each step's B new ids as a list, with None for a row that has ended. features: a frozen encoder's, for a method
    that takes them.

    ValueError for sizes, ids and knobs out of range; TypeError for tokens that are not integers.
    """
    B, T = _check(tokens, lengths, max_new_tokens, stop, tokenizer)
    _check_ids(tokens, lengths, model.config.vocab_size)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    device = tokens.device
    lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device, torch.int64)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    ends = None if eos_id is None else torch.tensor(eos_id, device=device)

    real = torch.arange(T, device=device) < lengths[:, None]
    out = torch.full((B, T + max_new_tokens), pad_id, dtype=torch.int64, device=device)
    out[:, :T] = torch.where(real, tokens, pad_id)
    if B == 0 or max_new_tokens == 0:
        return out
    rows, made = torch.arange(B, device=device), 0
    seen = None
    if repetition_penalty != 1.0:
        seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
        seen[rows[:, None].expand(B, T)[real], tokens[real].long()] = True
    done = torch.zeros(B, dtype=torch.bool, device=device)
    with torch.inference_mode(), evaluating(model):
        cache = model.new_cache(B, T + max_new_tokens)
        knobs = {} if features is None else {"features": features}
        decode = decoder(model, cache, **knobs)
        h = model.hidden(out[:, :T], cache=cache, lengths=lengths, **knobs)[rows, lengths - 1]  # (B, C)
        while True:
            step = sampling.pick(model.lm_head(h), seen, generator)  # (B,)
            if seen is not None:
                seen[rows, step] = True
            if ends is not None or stop:
                step = torch.where(done, pad_id, step)
            out[rows, lengths + made] = step
            made += 1
            if on_token is not None:
                on_token([None if over else i for i, over in zip(step.tolist(), done.tolist(), strict=True)])
            if ends is not None:
                done |= torch.isin(step, ends)
            if stop:
                done |= _stopped(out, lengths, made, stop, tokenizer)
            if made == max_new_tokens or ((ends is not None or stop) and bool(done.all())):
                break
            h = decode(step)
    return out[:, : T + made].clone()


@dataclass(frozen=True)
class Sampling:
    """How a token is picked from logits. See `generate` for the knobs."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        ranges = (
            ("temperature", "finite and at least 0", lambda t: 0.0 <= t < float("inf")),
            ("top_k", "at least 1", lambda k: k >= 1),
            ("top_p", "in (0, 1]", lambda p: 0.0 < p <= 1.0),
            ("min_p", "in [0, 1]", lambda p: 0.0 <= p <= 1.0),
            ("repetition_penalty", "finite and above 0", lambda r: 0.0 < r < float("inf")),
        )
        for name, wanted, holds in ranges:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"generate: {name} must be {wanted}, got {value}")

    def pick(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """One token id per row of logits (B, V). seen: bool (B, V), the tokens that each row has already.

        Only a repetition penalty asks for `seen`.
        """
        if self.repetition_penalty != 1.0:
            r = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
        if self.temperature == 0.0:
            return logits.argmax(-1)
        probabilities = self.restrict(logits.float() / self.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with -inf where top_k, then top_p, then min_p rule a token out."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, where = logits.sort(-1, descending=True)
            p = ordered.softmax(-1)
            out = p.cumsum(-1) - p >= self.top_p  # reached before this one
            logits = logits.masked_fill(out.scatter(-1, where, out), -torch.inf)
        if self.min_p is not None:
            p = logits.softmax(-1)
            logits = logits.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), -torch.inf)
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


def _check(tokens, lengths, max_new_tokens, stop, tokenizer) -> tuple[int, int]:
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"generate: tokens must have shape (B, T) with T > 0, got {list(tokens.shape)}")
    B, T = tokens.shape
    if lengths is not None and (tuple(lengths.shape) != (B,) or bool(((lengths < 1) | (lengths > T)).any())):
        raise ValueError(f"generate: lengths must be {B} numbers from 1 to {T}, got {lengths.tolist()}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if stop is not None and "" in ((stop,) if isinstance(stop, str) else stop):
        raise ValueError(f"generate: stop must hold no empty string, got {stop!r}")
    if stop is not None and tokenizer is None:
        raise ValueError("generate: tokenizer must be given with stop, got None")
    return B, T


def _check_ids(tokens: Tensor, lengths: Tensor | None, vocab_size: int) -> None:
    """The padding may hold anything."""
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"generate: tokens must be integers, got {str(tokens.dtype).removeprefix('torch.')}")
    outside = (tokens < 0) | (tokens >= vocab_size)
    if lengths is not None:
        outside &= torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None].to(tokens.device)
    if outside.any():
        raise ValueError(f"generate: tokens must be ids from 0 to {vocab_size - 1}, got {tokens[outside][0].item()}")
