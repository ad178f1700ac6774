"""How likely tokens were: log-softmax of the model's raw logits, as responses report it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.sampling import PositionLogprobs, TokenLogprob

POSITIONS_MAX = 64
"""Positions whose log-softmax over the vocabulary is held in float32 at once."""


def logprobs_of(logits: Tensor, chosen: Sequence[int], alternatives: int) -> list[PositionLogprobs]:
    """For each row of [positions, vocabulary]: the chosen token first, then the most likely ones, best first."""
    positions: list[PositionLogprobs] = []
    for begin in range(0, len(chosen), POSITIONS_MAX):
        end = min(begin + POSITIONS_MAX, len(chosen))
        positions.extend(_logprobs_of(logits[begin:end], chosen[begin:end], alternatives))
    return positions


def _logprobs_of(logits: Tensor, chosen: Sequence[int], alternatives: int) -> list[PositionLogprobs]:
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(alternatives, logprobs.shape[1]))
    return [
        (TokenLogprob(token, logprob), *map(TokenLogprob, ids, values))
        for token, logprob, ids, values in zip(chosen, own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
