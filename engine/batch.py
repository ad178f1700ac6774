"""One engine step as data: what the scheduler decides and the model runner computes."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.ids import BlockId, RequestId
from baton.sampling import SamplingParams
from engine.interface import PositionLogprobs


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step: compute `token_ids` at positions `start` and up.

    The keys and values of positions below `start` already lie in `blocks`; the new ones are written
    there. `blocks` is the sequence's block table and covers all of them.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    start: int
    blocks: Sequence[BlockId]
    samples: bool
    """Whether a token is drawn from the last position: false for all chunks of a prompt but the last."""
    prompt_logprobs: int | None = None
    """Report this many alternatives for what follows each position of this row, within the prompt."""
    next_token: int | None = None
    """With prompt_logprobs: the prompt's token right after this row; None where the prompt ends with it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw the next token of one row that samples."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    output: Sequence[int]
    """What was generated so far: penalties count it, and its length is the position of the draw."""
    forbidden: frozenset[int]
    """Tokens that must not be drawn now: the stop tokens while below min_tokens."""


@dataclass(frozen=True, slots=True)
class Drawn:
    token_id: int
    logprobs: PositionLogprobs
    """Empty unless asked for. Log-softmax of the raw logits, before temperature, penalties and filters."""
