"""What happened to the prefix cache since it was last asked: the net of it."""

from collections.abc import Sequence
from typing import Protocol

from baton.cluster.cache_events import CacheChanges
from baton.ids import BlockHash, BlockId
from baton.latency import TIERS, Tier


class CacheJournal:
    """Hears a BlockPool. A block that was stored and removed again, or removed and stored again, has not changed."""

    def __init__(self) -> None:
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def stored(self, block: BlockId, name: BlockHash) -> None:
        del block
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def removed(self, block: BlockId, name: BlockHash) -> None:
        del block
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def flush(self) -> None:
        """Nothing: it keeps names, not what is in the blocks."""

    def take(self) -> CacheChanges:
        """In the order in which it happened; the journal starts anew."""
        if not (self._stored or self._removed):
            return NO_CHANGES
        stored, removed = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return CacheChanges({"hbm": stored} if stored else {}, removed=removed)


NO_CHANGES = CacheChanges()


class Whereabouts(Protocol):
    """Knows all tiers: kvcache.tiers.interface.LowerTiers."""

    def tier_of(self, name: BlockHash) -> Tier | None: ...

    def changed(self) -> Sequence[BlockHash]: ...


def across_tiers(in_pool: CacheChanges, tiers: Whereabouts) -> CacheChanges:
    """The net change where there are tiers below the pool, each block by the highest that it is in now; `in_pool` is
    what happened in the pool. A block that is below it now may have been told before or not: either way it is
    `moved`."""
    changed = tiers.changed()
    if not (changed or in_pool):
        return NO_CHANGES
    came = in_pool.stored.get("hbm", ())
    groups: dict[Tier | None, dict[BlockHash, None]] = {}
    for name in dict.fromkeys((*came, *in_pool.removed, *changed)):
        groups.setdefault(tiers.tier_of(name), {})[name] = None
    stored = tuple(name for name in came if name in groups.get("hbm", ()))
    moved = {tier: tuple(groups[tier]) for tier in TIERS[1:] if tier in groups}
    return CacheChanges({"hbm": stored} if stored else {}, moved, tuple(groups.get(None, ())))
