"""What keeping blocks is worth, by the policy, and which are worth least."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Final

import numpy as np

from baton.ids import BlockHash
from kvcache.eviction.interface import Counts, Floats, KeepPolicy
from kvcache.name_table import Rows
from kvcache.tiers.index import Mark, TierIndex
from kvcache.tiers.interface import LowerTier

SAMPLE: Final = 128
"""Of the blocks that may go, so many are drawn and the worst of them go: the worst of all within a per cent or so."""


class Worth:
    def __init__(
        self,
        index: TierIndex,
        policy: KeepPolicy,
        saved_s: Callable[[int], float],
        row_bytes: int,
        random: np.random.Generator,
    ) -> None:
        self._index, self._policy, self._saved_s = index, policy, saved_s
        self._row_bytes, self._random = row_bytes, random

    def seen(self, names: Sequence[BlockHash], first: int, now_s: float) -> Counts:
        """A request uses these, adjacent in its prompt; how often each was used before."""
        return self._policy.seen(names, first, now_s)

    def values(self, rows: Rows | Sequence[int], now_s: float) -> Floats:
        """Infinite for what may not be dropped."""
        some = np.asarray(rows, np.int64)
        kept = (self._index.marks[some] & np.uint8(Mark.PROMISED | Mark.PINNED)) > 0
        return np.where(kept, inf, self._plain_values(some, now_s))

    def _plain_values(self, rows: Rows, now_s: float) -> Floats:
        return self._policy.values(self._index.candidates(rows, now_s, self._saved_s, self._row_bytes))

    def weakest(self, tier: LowerTier, now_s: float) -> list[tuple[int, float]]:
        """Leaves of the tier with what they are worth, promised or not, the least first."""
        rows = self._index.leaves[tier].sample(SAMPLE, self._random)
        if not len(rows):
            return []
        values = self._plain_values(rows, now_s)
        order = np.argsort(values, kind="stable")
        return list(zip(rows[order].tolist(), values[order].tolist(), strict=True))

    def doubtful(self, tier: LowerTier, count: int, now_s: float) -> list[int]:
        """Of the weakest leaves, those of whose copies on other workers nothing is known."""
        unknown = [row for row, _ in self.weakest(tier, now_s) if not self._index.copies[row]]
        return unknown[:count]
