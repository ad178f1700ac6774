"""Sequences that wait for blocks, in the order of their arrival, and how much they will ask for."""

from collections import deque
from collections.abc import Iterator

from engine.interface import Prefill
from engine.sequence import LiveSequence


class WaitingLine:
    """What it asks for is kept up to date rather than summed up: statistics are taken at every step. A sequence's
    tokens and its Prefill do not change while it waits."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._line: deque[LiveSequence] = deque()
        self.tokens = 0
        """To compute on this engine."""
        self.kv_blocks = 0
        """That all of them have to hold, the prefixes that they may find cached included."""
        self._squares = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[LiveSequence]:
        return iter(self._line)

    @property
    def token_context(self) -> float:
        """The sum of `new * context` over the tokens to compute, as PrefillCost has it."""
        return self._squares / 2

    def join(self, sequence: LiveSequence) -> None:
        """Behind all others."""
        self._line.append(sequence)
        self._count(sequence, 1)

    def rejoin(self, sequence: LiveSequence) -> None:
        """At its place by arrival."""
        place = sum(1 for other in self._line if other.arrival < sequence.arrival)
        self._line.insert(place, sequence)
        self._count(sequence, 1)

    def leave(self, sequence: LiveSequence) -> None:
        """O(its place)."""
        self._line.remove(sequence)
        self._count(sequence, -1)

    def _count(self, sequence: LiveSequence, sign: int) -> None:
        tokens = len(sequence.tokens)
        self.kv_blocks -= sign * (-tokens // self._block_tokens)
        if sequence.prefill is not Prefill.ELSEWHERE:
            self.tokens += sign * tokens
            self._squares += sign * tokens**2
