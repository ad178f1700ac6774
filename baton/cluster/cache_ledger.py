"""What a worker's cache holds, and what of it the cluster has yet to be told."""

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from baton.cluster.cache_events import CacheChanges, CacheEvents, CacheInventory
from baton.ids import BlockHash
from baton.latency import TIERS, Tier

BATCH_BLOCKS_MAX = 2048
"""Changes in one batch: 32 KiB of names."""
PENDING_BLOCKS_MAX = 65_536
"""Changes that may wait to be told, about 10 MiB; past it they are dropped, and a number is skipped."""


class _Change(NamedTuple):
    kind: str
    tier: Tier | None


_STORED = {tier: _Change("stored", tier) for tier in TIERS}
_MOVED = {tier: _Change("moved", tier) for tier in TIERS}
_REMOVED = _Change("removed", None)


class CacheLedger:
    """Pure: the inventory that snapshots are made of, and the numbered batches that follow from it.

    Of each block only the last change counts, so what waits is merged, and a batch says where its blocks are at
    its end: an inventory taken meanwhile includes part of the next batch, which does no harm (see CacheEvents).
    Memory: a set entry for each block, 30 to 60 bytes, beside the 16-byte name that the block pool keeps anyway.
    """

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.sequence = 0
        """Of the last batch made, or skipped."""
        self.dropped = 0
        """How often changes were dropped because too many waited."""
        self._held: dict[Tier, set[BlockHash]] = {tier: set() for tier in TIERS}
        self._pending: dict[BlockHash, _Change] = {}

    def record(self, changes: CacheChanges) -> None:
        for tier, names in changes.stored.items():
            self._put(names, tier, _STORED[tier])
        for tier, names in changes.moved.items():
            self._put(names, tier, _MOVED[tier])
        self._remove(changes.removed)
        if len(self._pending) > PENDING_BLOCKS_MAX:
            self._pending.clear()
            self.sequence += 1  # nobody ever sees this number: readers notice, and ask for the inventory
            self.dropped += 1

    @property
    def has_news(self) -> bool:
        return bool(self._pending)

    def take(self) -> CacheEvents:
        """The next batch of what waits; there must be some."""
        assert self._pending
        batch = self._pending
        if len(batch) <= BATCH_BLOCKS_MAX:
            self._pending = {}
        else:
            batch = dict(islice(batch.items(), BATCH_BLOCKS_MAX))
            for name in batch:
                del self._pending[name]
        self.sequence += 1
        return CacheEvents.of(self.epoch, self.sequence, _grouped(batch.items()))

    def inventory(self) -> CacheInventory:
        """O(blocks): 0.1 s for a million, names scattered over memory."""
        return CacheInventory(
            self.epoch, self.sequence, {tier: b"".join(names) for tier, names in self._held.items() if names}
        )

    def _put(self, names: tuple[BlockHash, ...], tier: Tier, change: _Change) -> None:
        for other, held in self._held.items():
            if other == tier:
                held.update(names)
            elif held:
                held.difference_update(names)
        self._pending.update(dict.fromkeys(names, change))

    def _remove(self, names: tuple[BlockHash, ...]) -> None:
        for held in self._held.values():
            held.difference_update(names)
        self._pending.update(dict.fromkeys(names, _REMOVED))


def _grouped(changes: Iterable[tuple[BlockHash, _Change]]) -> CacheChanges:
    """In each group the order in which the blocks first changed: a sequence's head before its tail."""
    groups: dict[_Change, list[BlockHash]] = {}
    for name, change in changes:
        groups.setdefault(change, []).append(name)
    stored = {tier: tuple(groups[change]) for tier, change in _STORED.items() if change in groups}
    moved = {tier: tuple(groups[change]) for tier, change in _MOVED.items() if change in groups}
    return CacheChanges(stored, moved, tuple(groups.get(_REMOVED, ())))
