"""The prefixes that are used again and again."""

from typing import Final

import numpy as np

from kvcache.tiers.index.tier_index import USES_MAX, TierIndex
from kvcache.tiers.interface import HotPrefix

ROWS_MAX: Final = 65_536
"""Of the most used blocks, that are looked at; each block more would cost the engine's thread time."""


def hottest(index: TierIndex, count: int) -> list[HotPrefix]:
    """The last blocks of prefixes, the most used first: of blocks that follow each other and are used equally often,
    the deepest. Reads how often every block was used."""
    uses = index.uses[: index.table.rows_used + 1]
    rows = np.flatnonzero(uses >= _threshold(uses))[:ROWS_MAX]
    rows = rows[index.are_present(rows)]
    parents = index.parent[rows]
    goes_on = np.zeros(len(uses), bool)
    goes_on[parents[uses[parents] == uses[rows]]] = True
    ends = rows[~goes_on[rows]]
    order = np.lexsort((ends, -index.depth[ends], -uses[ends].astype(np.int64)))[:count]
    return [_prefix(index, int(row)) for row in ends[order]]


def _threshold(uses: "np.ndarray[tuple[int], np.dtype[np.uint16]]") -> int:
    """The fewest uses, but at least one, that no more than ROWS_MAX blocks have; the most that any has, if need be."""
    at_least = np.cumsum(np.bincount(uses, minlength=USES_MAX + 1)[::-1])[::-1]
    enough = np.flatnonzero(at_least[1:] <= ROWS_MAX)
    return min(int(enough[0]) + 1, max(1, int(uses.max()))) if len(enough) else USES_MAX


def _prefix(index: TierIndex, row: int) -> HotPrefix:
    tier = index.tier_of(row)
    assert tier is not None
    return HotPrefix(index.table.name(row), int(index.depth[row]), int(index.uses[row]), tier)
