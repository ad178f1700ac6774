"""What keeping blocks is worth, by the policy, and which are worth least."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Final

import numpy as np

from kvcache.eviction.interface import Floats, KeepPolicy
from kvcache.name_table import Rows
from kvcache.tiers.index.row_set import RowSet
from kvcache.tiers.index.tier_index import Mark, TierIndex
from kvcache.tiers.interface import LowerTier

SAMPLE: Final = 128
"""Of the blocks that may go, so many are drawn for every PER_SAMPLE that must, and the worst of them go: the worst of
all within a per cent or so."""
PER_SAMPLE: Final = 4
"""Of conversations, one of a sample is 5 % more hits than eight."""
SAMPLE_MAX: Final = 4096
"""A quarter of a millisecond."""
SAVED_S: Final = 1.0
"""For so long what a depth saves is taken to be the same."""


class SavedByDepth(dict[int, float]):
    """Asked for each depth once."""

    def __init__(self, saved_s: Callable[[int], float]) -> None:
        super().__init__()
        self._saved_s = saved_s
        self._asked_s = -inf

    def __missing__(self, depth: int) -> float:
        self[depth] = saved_s = self._saved_s(depth)
        return saved_s

    def fresh(self, now_s: float) -> Callable[[int], float]:
        if now_s - self._asked_s >= SAVED_S:
            self.clear()
            self._asked_s = now_s
        return self.__getitem__


class Worth:
    def __init__(
        self,
        index: TierIndex,
        policy: KeepPolicy,
        saved_s: Callable[[int], float],
        row_bytes: int,
        random: np.random.Generator,
    ) -> None:
        self._index, self._policy, self._saved = index, policy, SavedByDepth(saved_s)
        self._row_bytes, self._random = row_bytes, random

    def values(self, rows: Rows | Sequence[int], now_s: float) -> Floats:
        """Infinite for what may not be dropped."""
        some = np.asarray(rows, np.int64)
        kept = (self._index.marks[some] & np.uint8(Mark.PROMISED | Mark.PINNED)) > 0
        return np.where(kept, inf, self._plain_values(some, now_s))

    def _plain_values(self, rows: Rows, now_s: float) -> Floats:
        return self._policy.values(self._index.candidates(rows, now_s, self._saved.fresh(now_s), self._row_bytes))

    def weakest(self, tier: LowerTier, now_s: float, count: int = 1) -> list[tuple[int, float]]:
        """Leaves of the tier with what they are worth, promised or not, the least first: of a sample for so many that
        must go."""
        size = min(SAMPLE * -(-count // PER_SAMPLE), SAMPLE_MAX)
        return self._weakest_of(self._index.leaves[tier], size, now_s)

    def spare(self, now_s: float) -> list[int]:
        """Blocks in DDR that lie on the SSD too: those that HBM has as well first, then those that are worth least."""
        rows = np.array([row for row, _ in self._weakest_of(self._index.spare, SAMPLE, now_s)], np.int64)
        order = np.argsort(self._index.places["hbm"][rows] == 0, kind="stable")
        return rows[order].tolist()  # type: ignore[no-any-return]

    def _weakest_of(self, some: RowSet, size: int, now_s: float) -> list[tuple[int, float]]:
        """At most SAMPLE of a sample of this size."""
        rows = some.sample(size, self._random)
        if not len(rows):
            return []
        values = self._plain_values(rows, now_s)
        order = np.argsort(values, kind="stable")[:SAMPLE]
        return list(zip(rows[order].tolist(), values[order].tolist(), strict=True))

    def doubtful(self, tier: LowerTier, count: int, now_s: float) -> list[int]:
        """Of the weakest leaves, those of whose copies on other workers nothing is known."""
        unknown = [row for row, _ in self.weakest(tier, now_s) if not self._index.copies[row]]
        return unknown[:count]
