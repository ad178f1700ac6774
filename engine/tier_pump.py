"""The lower tiers' turn between two steps: what they hold of the pool meanwhile, and when they want another turn."""

from collections import Counter
from collections.abc import Callable, Sequence

from baton.cluster.cache_events import CacheChanges
from baton.ids import BlockHash, BlockId
from engine.cache_journal import CacheJournal, across_tiers
from kvcache.block_pool import BlockPool
from kvcache.tiers.interface import LowerTiers


class LentBlocks:
    """Implements kvcache.tiers.interface.PoolView, and counts what of the pool is held by it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.holds: Counter[BlockId] = Counter()

    @property
    def used(self) -> int:
        return self._pool.used

    def upcoming(self, count: int) -> Sequence[tuple[BlockId, BlockHash]]:
        return self._pool.upcoming(count)

    def hold(self, blocks: Sequence[BlockId]) -> None:
        self._pool.hold(blocks)
        self.holds.update(blocks)

    def release(self, blocks: Sequence[BlockId], *, is_used: bool = True) -> None:
        assert all(self.holds[block] for block in blocks), "released blocks that the tiers do not hold"
        self.holds -= Counter(blocks)
        self._pool.release(blocks, is_used=is_used)


class TierPump:
    """Without lower tiers it does nothing, and tells what happened in the pool."""

    def __init__(self, tiers: LowerTiers | None, pool: BlockPool, journal: CacheJournal) -> None:
        self._tiers, self._journal = tiers, journal
        self._lent = LentBlocks(pool)
        self._wake: Callable[[], None] = _nobody
        self._is_wanted = False
        if tiers is not None:
            tiers.wake = self.want

    def on_wake(self, wake: Callable[[], None]) -> None:
        """`wake` is called in any thread when there is something to do, beside what `is_wanted` says."""
        self._wake = wake

    @property
    def is_wanted(self) -> bool:
        """The tiers should have a turn, though there may be nothing to compute."""
        return self._is_wanted

    def want(self) -> None:
        """In any thread."""
        self._is_wanted = True
        self._wake()

    def changed(self) -> None:
        """On the engine's thread: the pool is not what it was at the last turn."""
        self._is_wanted = self._tiers is not None

    def turn(self) -> None:
        self._is_wanted = False  # before the turn: what comes up during it asks for another
        if self._tiers is not None:
            self._tiers.pump(self._lent)

    def take_changes(self) -> CacheChanges:
        in_pool = self._journal.take()
        return in_pool if self._tiers is None else across_tiers(in_pool, self._tiers)

    def holds(self) -> Counter[BlockId]:
        return self._lent.holds


def _nobody() -> None:
    pass
