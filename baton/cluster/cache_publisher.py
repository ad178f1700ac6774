"""The worker's side of KV events: batches go into its Redis stream, one write at a time."""

import asyncio
import contextlib
import logging
import random

from redis.asyncio import Redis

from baton.cluster.cache_events import CacheChanges, CacheInventory, stream_key
from baton.cluster.cache_ledger import CacheLedger
from baton.cluster.lease import Lease
from baton.cluster.redis_client import describe
from baton.ids import WorkerId

log = logging.getLogger(__name__)

STREAM_BATCHES_MAX = 1024
"""Batches that a stream keeps, about: twenty seconds at the fastest. With 16 changes each they take 0.4 MB of Redis's
memory, and 32 MiB if every one is as large as can be."""
STREAM_EXPIRY_S = 60.0
"""After the last batch. Who follows has long read it by then, and who is new asks the worker."""
LINGER_S = 0.02
"""Between two writes at least, so that what happens meanwhile goes as one batch."""
WRITE_BATCHES_MAX = 8
"""In one write: what one retry sends at most."""
EVENTS_FIELD = b"e"


class CacheEventPublisher:
    """One worker's stream; lives on the loop. The client stays the caller's.

    While Redis is away changes merge into each other, up to a bound past which they are dropped and a sequence
    number is skipped: readers then notice, and ask for the inventory. A write whose fate is unknown is done again
    under the same numbers, so readers may see a batch twice, never two batches under one number.
    """

    def __init__(
        self, redis: Redis, key_prefix: str, worker_id: WorkerId, epoch: str, lease: Lease | None = None
    ) -> None:
        self._redis, self._key, self._lease = redis, stream_key(key_prefix, worker_id), lease or Lease()
        self._ledger = CacheLedger(epoch)
        self._unwritten: list[bytes] = []
        self._news = asyncio.Event()
        self._is_closed = False
        self._writing: asyncio.Task[None] | None = None

    @property
    def sequence(self) -> int:
        """Of the last batch made. It belongs into the worker's record, so that routers notice a batch that got lost."""
        return self._ledger.sequence

    @property
    def dropped(self) -> int:
        """How often changes were dropped because Redis was away for too long."""
        return self._ledger.dropped

    def record(self, changes: CacheChanges) -> None:
        """Returns at once; call it on the loop."""
        if changes:
            self._ledger.record(changes)
            self._news.set()

    def inventory(self) -> CacheInventory:
        """Everything recorded so far, told or not yet."""
        return self._ledger.inventory()

    async def start(self) -> None:
        self._writing = asyncio.create_task(self._run(), name="publish KV events")

    async def close(self) -> None:
        """Idempotent. What is not written yet stays untold: the worker is going."""
        self._is_closed = True  # because a cancellation may get lost in Redis's client
        if self._writing is not None:
            self._writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writing
            self._writing = None

    async def _run(self) -> None:
        failures = 0
        while not self._is_closed:
            await self._news.wait()
            try:
                await self._write()
            except Exception as error:  # a service loop: whatever it was, the next try may succeed
                failures += 1
                if failures == 1:
                    log.warning("Publishing KV events in Redis fails (%s); trying on", describe(error))
                await asyncio.sleep(self._lease.retry_delay_s(failures, random.random()))
            else:
                if failures:
                    log.info("Publishing KV events in Redis works again after %d tries", failures)
                failures = 0
                await asyncio.sleep(LINGER_S)

    async def _write(self) -> None:
        """Writes what waits, or a part of it; clears `_news` when nothing does any more."""
        while self._ledger.has_news and len(self._unwritten) < WRITE_BATCHES_MAX:
            self._unwritten.append(self._ledger.take().to_bytes())
        async with self._redis.pipeline(transaction=False) as commands:
            for batch in self._unwritten:
                commands.xadd(self._key, {EVENTS_FIELD: batch}, maxlen=STREAM_BATCHES_MAX, approximate=True)
            commands.pexpire(self._key, round(STREAM_EXPIRY_S * 1000))
            await commands.execute()
        self._unwritten.clear()
        if not self._ledger.has_news:
            self._news.clear()
