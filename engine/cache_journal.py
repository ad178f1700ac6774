"""What happened to the prefix cache since it was last asked: the net of it."""

from baton.cluster.cache_events import CacheChanges
from baton.ids import BlockHash, BlockId


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

    def take(self) -> CacheChanges:
        """In the order in which it happened; the journal starts anew."""
        if not (self._stored or self._removed):
            return NO_CHANGES
        stored, removed = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return CacheChanges({"hbm": stored} if stored else {}, removed=removed)


NO_CHANGES = CacheChanges()
