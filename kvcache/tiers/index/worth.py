"""What keeping blocks is worth, by the policy, and which are worth least."""

from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Final

import numpy as np

from kvcache.eviction.interface import Candidates, Counts, Floats, KeepPolicy
from kvcache.name_table import Rows
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.row_set import RowSet
from kvcache.tiers.index.tier_index import TierIndex
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


class SavedByDepth:
    """Asks for each depth once in SAVED_S."""

    def __init__(self, saved_s: Callable[[int], float]) -> None:
        self._saved_s = saved_s
        self._known = np.empty(0)
        """By depth; not a number: not asked yet."""
        self._asked_s = -inf

    def at(self, depths: Counts, now_s: float) -> Floats:
        if now_s - self._asked_s >= SAVED_S:
            self._known, self._asked_s = np.empty(0), now_s
        lacking = int(depths.max(initial=-1)) + 1 - len(self._known)
        if lacking > 0:
            self._known = np.append(self._known, np.full(lacking, nan))
        saved: Floats = self._known[depths]
        are_new = np.isnan(saved)
        if are_new.any():
            for depth in set(depths[are_new].tolist()):
                self._known[depth] = self._saved_s(depth)
            saved = self._known[depths]
        return saved


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
        index = self._index
        depth = index.depth[rows]
        blocks = Candidates(
            age_s=np.maximum(now_s - index.used_at[rows], 0.0),
            uses=index.uses[rows].astype(np.int32),
            depth=depth,
            saved_s=self._saved.at(depth, now_s),
            copies=np.maximum(index.copies[rows].astype(np.int32) - 1, 0),
            size_bytes=self._row_bytes,
        )
        return self._policy.values(blocks)

    def weakest(self, tier: LowerTier, now_s: float, count: int = 1) -> list[tuple[int, float]]:
        """Leaves of the tier with what they are worth, promised or not, the least first: of a sample for so many that
        must go."""
        size = min(SAMPLE * -(-count // PER_SAMPLE), SAMPLE_MAX)
        return self._weakest_of(self._index.leaves.of[tier], size, now_s)

    def spare(self, now_s: float) -> list[int]:
        """Blocks in DDR that lie on the SSD too: those that HBM has as well first, then those that are worth least."""
        rows = np.array([row for row, _ in self._weakest_of(self._index.leaves.spare, SAMPLE, now_s)], np.int64)
        order = np.argsort(self._index.places["hbm"][rows] == 0, kind="stable")
        return rows[order].tolist()  # type: ignore[no-any-return]

    def _weakest_of(self, some: RowSet, size: int, now_s: float) -> list[tuple[int, float]]:
        """At most SAMPLE of a sample of this size."""
        rows = some.sample(size, self._random)
        if not len(rows):
            return []
        values = self._plain_values(rows, now_s)
        if len(rows) > SAMPLE:
            lowest = np.argpartition(values, SAMPLE)[:SAMPLE]
            rows, values = rows[lowest], values[lowest]
        order = np.argsort(values, kind="stable")
        return list(zip(rows[order].tolist(), values[order].tolist(), strict=True))

    def doubtful(self, tier: LowerTier, count: int, now_s: float) -> list[int]:
        """Of the weakest leaves, those of whose copies on other workers nothing is known."""
        unknown = [row for row, _ in self.weakest(tier, now_s) if not self._index.copies[row]]
        return unknown[:count]
