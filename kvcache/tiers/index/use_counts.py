"""Tells the policy what requests use, many blocks at a time: a call of it takes as long for one block as for a hundred,
and decoding makes one block at a time."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from baton.ids import BlockHash
from kvcache.eviction.interface import KeepPolicy
from kvcache.tiers.index.tier_index import TierIndex

NAMES: Final = 256
"""Told when so many are waiting,"""
WAIT_S: Final = 0.1
"""or one for so long."""


class UseCounts:
    """How often a block was used comes to the index a little later than that it was."""

    def __init__(self, index: TierIndex, policy: KeepPolicy, hbm_blocks: int) -> None:
        self._index, self._policy = index, policy
        self._depth: dict[BlockHash, int] = {}
        """Of those that the policy was not told of yet."""
        self._since_s = 0.0
        self._coming_up: dict[BlockHash, None] = {}
        """And were not published yet: a use that has been counted. At most as many as HBM has."""
        self._coming_up_max = hbm_blocks

    def coming_up(self, names: Sequence[BlockHash]) -> None:
        """A request that uses them has them restored, of which `used` is told as well."""
        self._coming_up.update(dict.fromkeys(names))
        while len(self._coming_up) > self._coming_up_max:
            del self._coming_up[next(iter(self._coming_up))]

    def published(self, names: Sequence[BlockHash], first: int, now_s: float) -> None:
        """They are used, but for those that came up for a request that was counted when it did."""
        if not self._coming_up:
            self.used(names, first, now_s)
            return
        for depth, name in enumerate(names, first):
            if self._coming_up.pop(name, self) is self:
                self.used([name], depth, now_s)

    def used(self, names: Sequence[BlockHash], first: int, now_s: float) -> None:
        """Blocks of a prompt, the first at depth `first`."""
        if not self._depth.keys().isdisjoint(names):
            self.tell(now_s)  # the policy hears of each block of each use
        if not self._depth:
            self._since_s = now_s
        self._depth.update(zip(names, range(first, first + len(names)), strict=False))

    def tell_some(self, now_s: float) -> None:
        if self._depth and (len(self._depth) >= NAMES or now_s - self._since_s >= WAIT_S):
            self.tell(now_s)

    def tell(self, now_s: float) -> None:
        if not self._depth:
            return
        names = list(self._depth)
        depths = np.fromiter(self._depth.values(), np.int32, len(names))
        self._depth.clear()
        uses = self._policy.seen(names, depths, now_s)
        rows = self._index.table.find_all(names)
        are_present = self._index.are_present(rows)
        self._index.note_uses(rows[are_present], uses[are_present])
