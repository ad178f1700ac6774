"""A worker's cache as part of the cluster's: told to routers and to the directory, and what the directory says back."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from redis.asyncio import Redis

from baton.cluster.cache_events import CacheChanges
from baton.cluster.cache_publisher import CacheEventPublisher
from baton.cluster.lease import Lease, Repeater
from baton.errors import Overloaded
from baton.ids import BlockHash, WorkerId
from baton.rpc import worker_pb2
from engine.interface import Engine
from engine.thread import EngineThread
from kvcache.directory.directory import ASKED_NAMES_MAX, Directory
from kvcache.tiers.interface import LowerTiers

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Engine)
ASK_PERIOD_S = 1.0
DOUBTFUL_MAX = 512
"""Blocks that the directory is asked about at one time."""


class ClusterCache(Generic[E]):
    """One worker's, on its loop. Redis may be away at any time: then nothing is heard, and what is to be told waits."""

    def __init__(self, redis: Redis, key_prefix: str, worker_id: WorkerId, epoch: str, engine: EngineThread[E]) -> None:
        self._engine = engine
        self._events = CacheEventPublisher(redis, key_prefix, worker_id, epoch)
        self._directory = Directory(redis, key_prefix, worker_id, epoch, lambda: self._events.inventory().blocks)
        self._events.join(self._directory)
        self._asking = Repeater(self._ask, ASK_PERIOD_S, Lease(), "Asking for other copies of blocks")

    async def start(self, has_tiers: bool) -> None:
        """Without lower tiers nobody is there to heed what the directory says."""
        if has_tiers:
            self._directory.on_pins, self._directory.on_copies = self._on_pins, self._on_copies
        await self._directory.start()
        await self._events.start()
        if has_tiers:
            self._asking.start()

    async def close(self) -> None:
        """Idempotent."""
        await self._asking.close()
        await self._events.close()
        await self._directory.close()

    # ---- told

    def record(self, changes: CacheChanges) -> None:
        """Returns at once."""
        self._events.record(changes)

    @property
    def sequence(self) -> int:
        """Of the last batch of changes."""
        return self._events.sequence

    def snapshot(self) -> Iterator[worker_pb2.CacheSnapshot]:
        """Of this moment, however slowly it is read."""
        return self._events.inventory().messages()

    async def pin(self, names: Sequence[BlockHash], holder: WorkerId, ttl_s: float) -> None:
        """Asks another worker to keep what this one is about to read."""
        await self._directory.pin(names[:ASKED_NAMES_MAX], holder, ttl_s)

    # ---- heard

    def _on_pins(self, names: Sequence[BlockHash], until_s: float) -> None:
        self._tell_tiers(lambda tiers: tiers.pin(names, until_s))

    def _on_copies(self, copies: Sequence[tuple[BlockHash, int]]) -> None:
        self._tell_tiers(lambda tiers: tiers.note_copies(copies))

    def _tell_tiers(self, tell: Callable[[LowerTiers], None]) -> None:
        """Advice, which an engine that has too much to do already goes without."""

        def command(engine: E) -> None:
            if engine.tiers is not None:
                tell(engine.tiers)

        try:
            self._engine.post(command)
        except Overloaded as error:
            log.debug("the tiers were not told what the directory knows: %s", error)

    async def _ask(self) -> None:
        """Which of the blocks that may be dropped soon others have too: those may go before a last copy."""
        doubtful = await self._engine.call(_doubtful)
        if doubtful:
            copies = await self._directory.copies(doubtful)
            self._on_copies(list(zip(doubtful, copies, strict=False)))  # none, where Redis is away


def _doubtful(engine: Engine) -> Sequence[BlockHash]:
    return engine.tiers.doubtful(DOUBTFUL_MAX) if engine.tiers is not None else ()
