"""Draws the next tokens.

A draw depends on its seed, its position and its row's logits alone: never on the batch around it, the
worker or what was drawn before. The order is the field's: logprobs of the raw logits; logit bias and
forbidden tokens; penalties; temperature; min-p; top-k; top-p; one draw.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engine.batch import Draw, Drawn
from engine.logprobs import logprobs_of

CANDIDATES = 1024
"""Top-p looks at this many of the likeliest tokens before it sorts a whole vocabulary."""
_RANDOM_BITS = 52


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One token for each row of float32 [rows, vocabulary], which is left as it was."""
    adjusted = _adjust(logits, draws)
    tokens = adjusted.argmax(-1).tolist()
    random_rows = [row for row, draw in enumerate(draws) if not draw.params.is_greedy]
    if random_rows:
        chosen = _draw(_rows(adjusted, random_rows), [draws[row] for row in random_rows])
        for row, token in zip(random_rows, chosen, strict=True):
            tokens[row] = token
    return _with_logprobs(logits, draws, tokens)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that anybody computes alike from the seed and the position."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _RANDOM_BITS)) / float(1 << _RANDOM_BITS)


def _with_logprobs(logits: Tensor, draws: Sequence[Draw], tokens: Sequence[int]) -> list[Drawn]:
    asked = {row: draw.params.logprobs for row, draw in enumerate(draws) if draw.params.logprobs is not None}
    drawn = [Drawn(token, ()) for token in tokens]
    if asked:
        reported = logprobs_of(_rows(logits, list(asked)), [tokens[row] for row in asked], max(asked.values()))
        for (row, alternatives), position in zip(asked.items(), reported, strict=True):
            drawn[row] = Drawn(tokens[row], position[: 1 + alternatives])
    return drawn


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]


# ---- bias, forbidden tokens and penalties: row by row, for the rows that have any


def _adjust(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    rows = [row for row, draw in enumerate(draws) if _is_adjusted(draw)]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        _bias(logits[row], draws[row])
        _penalize(logits[row], draws[row])
    return logits


def _is_adjusted(draw: Draw) -> bool:
    params = draw.params
    return bool(
        params.logit_bias
        or draw.forbidden
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def _bias(row: Tensor, draw: Draw) -> None:
    if draw.params.logit_bias:
        row[_index(row, draw.params.logit_bias)] += _like(row, draw.params.logit_bias.values())
    if draw.forbidden:
        row[_index(row, draw.forbidden)] = -math.inf


def _penalize(row: Tensor, draw: Draw) -> None:
    """Repetition counts prompt and output; presence and frequency count the output."""
    params = draw.params
    if params.repetition_penalty != 1:
        seen = _index(row, {*draw.prompt, *draw.output})
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and draw.output:
        counts = Counter(draw.output)
        row[_index(row, counts)] -= params.presence_penalty + params.frequency_penalty * _like(row, counts.values())


def _index(row: Tensor, tokens: Iterable[int]) -> Tensor:
    return torch.tensor(list(tokens), device=row.device)


def _like(row: Tensor, values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=row.dtype, device=row.device)


# ---- temperature, filters and the draw: all random rows at once


def _draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverse CDF over the vocabulary in its own order, which tiny differences in logits cannot reorder."""
    logits = _filter(logits / _column(logits, draws, lambda draw: draw.params.temperature), draws)
    cumulative = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    uniforms = _column(cumulative, draws, lambda draw: uniform(draw.seed, len(draw.output)))
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return tokens[:, 0].clamp_(max=logits.shape[1] - 1).tolist()


def _filter(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Everything outside min-p, top-k and top-p, in this order, becomes -inf; equals of the last kept stay."""
    if any(draw.params.min_p > 0 for draw in draws):
        floor = _column(logits, draws, lambda draw: math.log(draw.params.min_p) if draw.params.min_p else -math.inf)
        logits = _keep(logits, logits.amax(-1, keepdim=True) + floor)
    top_k = [draw.params.top_k or logits.shape[1] for draw in draws]
    if min(top_k) < logits.shape[1]:
        logits = _keep(logits, _top_k_threshold(logits, top_k))
    if any(draw.params.top_p < 1 for draw in draws):
        logits = _keep(logits, _top_p_threshold(logits, _column(logits, draws, lambda draw: draw.params.top_p)))
    return logits


def _top_k_threshold(logits: Tensor, top_k: Sequence[int]) -> Tensor:
    """[rows, 1]: the k-th best logit; -inf for rows that keep all."""
    vocabulary_size = logits.shape[1]
    limited = [k if k < vocabulary_size else 0 for k in top_k]
    best = logits.topk(max(limited)).values
    kth = best.gather(1, torch.tensor([[max(k - 1, 0)] for k in limited], device=logits.device))
    return kth.masked_fill_(torch.tensor([[k == 0] for k in limited], device=logits.device), -math.inf)


def _top_p_threshold(logits: Tensor, top_p: Tensor) -> Tensor:
    """[rows, 1]: the lowest logit among the fewest likeliest tokens that together reach top_p; -inf where it is 1."""
    total = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(min(CANDIDATES, logits.shape[1])).values
    reached = (best - total).exp().cumsum(-1)
    if ((reached[:, -1:] < top_p) & (top_p < 1)).any():
        best = logits.sort(descending=True).values
        reached = (best - total).exp().cumsum(-1)
    last = (reached < top_p).sum(-1, keepdim=True).clamp_(max=best.shape[1] - 1)
    return best.gather(1, last).masked_fill_(top_p >= 1, -math.inf)


def _keep(logits: Tensor, threshold: Tensor) -> Tensor:
    return logits.masked_fill(logits < threshold, -math.inf)


def _column(like: Tensor, draws: Sequence[Draw], value: Callable[[Draw], float]) -> Tensor:
    """[rows, 1] of one number a draw."""
    return torch.tensor([[value(draw)] for draw in draws], dtype=like.dtype, device=like.device)
