"""One step laid out over the pool: where each new token's KV is written, and where each row reads.

Positions count tokens of one sequence; *slots* count tokens of the whole pool, block by block:
`slot = block * block_tokens + offset in block`. What all layers share is worked out here, once a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.ids import BlockId
from engine.batch import Row

RUN_TOKENS_MIN = 1024
"""Runs of adjacent blocks are read in place when there is one, or when they are at least this long on average:
below it, one product more costs more than copying the row's KV together, which stays in the CPU's cache."""

Read = tuple[slice, ...] | Tensor
"""The slots that one row reads, in the order of their positions: adjacent runs, or an index of all of them."""


@dataclass(frozen=True, slots=True)
class Span:
    """One row in the packed step."""

    first: int
    """Where its queries start among the step's tokens."""
    queries: int
    context: int
    """Tokens its last query attends to, itself included."""
    blocks: Sequence[BlockId]

    @property
    def start(self) -> int:
        """The position of its first query."""
        return self.context - self.queries

    @property
    def is_decode(self) -> bool:
        return self.queries == 1

    def first_visible(self, window: int | None) -> int:
        """The oldest position that any of its queries attends to; a window counts the query itself."""
        return 0 if window is None else max(0, self.start - window + 1)


class StepPlan:
    """The packed step: rows one after another, as one sequence of `tokens` tokens."""

    def __init__(self, rows: Sequence[Row], block_tokens: int, device: torch.device) -> None:
        self.block_tokens = block_tokens
        self.device = device
        self.spans = _lay_out(rows)
        self.tokens = sum(span.queries for span in self.spans)
        self.decodes = tuple(span for span in self.spans if span.is_decode)
        self.prefills = tuple(span for span in self.spans if not span.is_decode)
        self._reads: dict[tuple[int, int | None], Read] = {}

    @cached_property
    def slots(self) -> Tensor:
        """[tokens]: where each new token's keys and values go."""
        slots = [slot_index(span.blocks, self.block_tokens, span.start, span.context) for span in self.spans]
        return torch.from_numpy(np.concatenate(slots)).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[tokens]: each token's position in its own sequence."""
        positions = np.concatenate([np.arange(span.start, span.context) for span in self.spans])
        return torch.from_numpy(positions).to(self.device)

    @cached_property
    def decode_indices(self) -> Tensor:
        """[decode rows]: their places among the step's tokens."""
        return torch.tensor([span.first for span in self.decodes], device=self.device)

    def read(self, span: Span, window: int | None) -> Read:
        """Where a row's visible KV lies, from `span.first_visible(window)` up to its context."""
        key = (span.first, window)
        if key not in self._reads:
            self._reads[key] = self._find(span, window)
        return self._reads[key]

    def _find(self, span: Span, window: int | None) -> Read:
        begin = span.first_visible(window)
        runs = slot_runs(span.blocks, self.block_tokens, begin, span.context)
        if len(runs) == 1 or span.context - begin >= RUN_TOKENS_MIN * len(runs):
            return tuple(slice(*run) for run in runs)
        slots = slot_index(span.blocks, self.block_tokens, begin, span.context)
        return torch.from_numpy(slots).to(self.device)


def slot_runs(blocks: Sequence[BlockId], block_tokens: int, begin: int, end: int) -> list[tuple[int, int]]:
    """The slots of positions [begin, end), as [first, last) of adjacent ones, in the order of the positions."""
    first_block = begin // block_tokens
    ids = np.asarray(blocks[first_block : -(-end // block_tokens)])
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    lows = ids[starts] * block_tokens
    highs = (ids[np.append(starts[1:], len(ids)) - 1] + 1) * block_tokens
    lows[0] += begin - first_block * block_tokens
    highs[-1] -= (first_block + len(ids)) * block_tokens - end
    return list(zip(lows.tolist(), highs.tolist(), strict=True))


def slot_index(blocks: Sequence[BlockId], block_tokens: int, begin: int, end: int) -> npt.NDArray[np.int64]:
    """The slots of positions [begin, end), one by one."""
    first_block = begin // block_tokens
    ids = np.asarray(blocks[first_block : -(-end // block_tokens)], dtype=np.int64)
    slots = (ids[:, None] * block_tokens + np.arange(block_tokens)).reshape(-1)
    return slots[begin - first_block * block_tokens : end - first_block * block_tokens]


def _lay_out(rows: Sequence[Row]) -> tuple[Span, ...]:
    spans, first = [], 0
    for row in rows:
        queries = len(row.token_ids)
        spans.append(Span(first, queries, row.start + queries, row.blocks))
        first += queries
    return tuple(spans)
