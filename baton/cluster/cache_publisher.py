"""The worker's side of KV events: numbered batches of changes go into its Redis stream, one write at a time, and to
whoever joined (the directory of blocks) in the same round trip."""

from collections.abc import Sequence
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from baton.cluster.cache_events import CacheChanges, CacheEvents, CacheInventory, stream_key
from baton.cluster.cache_ledger import CacheLedger
from baton.cluster.lease import Lease
from baton.cluster.redis_writer import RedisWriter
from baton.ids import WorkerId

STREAM_BATCHES_MAX = 1024
"""Batches that a stream keeps, about: twenty seconds at the fastest. With 16 changes each they take 0.4 MB of Redis's
memory, and 32 MiB if every one is as large as can be."""
STREAM_EXPIRY_S = 60.0
"""After the last batch. Who follows has long read it by then, and who is new asks the worker."""
WRITE_BATCHES_MAX = 8
"""In one write: what one retry sends at most."""
EVENTS_FIELD = b"e"


class LedgerFollower(Protocol):
    """Who is told the same batches as the stream, with commands of its own in the same pipeline."""

    @property
    def has_news(self) -> bool:
        """Whether it wants a write soon, not only at the next heartbeat."""

    def told(self, batch: CacheEvents) -> None:
        """A new batch; comes once, before the `begin` of the write that takes it along. At most WRITE_BATCHES_MAX
        come before a write has succeeded."""

    def lost(self) -> None:
        """Changes were dropped: only the inventory says what the worker holds."""

    def begin(self, commands: Pipeline, is_complete: bool) -> None:
        """Adds its commands, none of them to be decoded; `is_complete`: no change waits that it was not told of."""

    def finish(self, replies: Sequence[Any]) -> None:
        """One to each command, an exception where Redis refused it. Not called if the connection failed: then nobody
        knows which commands were carried out."""


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
        self._follower: LedgerFollower | None = None
        self._writer = RedisWriter(self._write, self._lease, "Publishing KV events")

    @property
    def sequence(self) -> int:
        """Of the last batch made. It belongs into the worker's record, so that routers notice a batch that got lost."""
        return self._ledger.sequence

    @property
    def dropped(self) -> int:
        """How often changes were dropped because Redis was away for too long."""
        return self._ledger.dropped

    @property
    def has_news(self) -> bool:
        """Whether something waits to be written, or has no answer yet."""
        waits = self._ledger.has_news or bool(self._unwritten)
        return waits or (self._follower is not None and self._follower.has_news)

    def join(self, follower: LedgerFollower) -> None:
        """Before `start`, one at most. From then on there is a write at each heartbeat, news or not."""
        assert self._follower is None
        self._follower = follower

    def record(self, changes: CacheChanges) -> None:
        """Returns at once; call it on the loop."""
        if not changes:
            return
        dropped = self._ledger.dropped
        self._ledger.record(changes)
        if self._follower and self._ledger.dropped > dropped:
            self._follower.lost()
        self._writer.wake()

    def inventory(self) -> CacheInventory:
        """Everything recorded so far, told or not yet."""
        return self._ledger.inventory()

    async def start(self) -> None:
        self._writer.start(self._lease.heartbeat_s if self._follower else None)

    async def close(self) -> None:
        """Idempotent. What is not written yet stays untold: the worker is going."""
        await self._writer.close()

    async def _write(self) -> bool:
        """Writes what waits, or a part of it; whether there is more."""
        self._take_batches()
        async with self._redis.pipeline(transaction=False) as commands:
            self._add_batches(commands)
            own = len(commands)
            if self._follower:
                self._follower.begin(commands, is_complete=not self._ledger.has_news)
            replies = await commands.execute(raise_on_error=False)
        if self._follower:
            self._follower.finish(replies[own:])
        _raise_first(replies[:own])
        self._unwritten.clear()
        return self.has_news

    def _take_batches(self) -> None:
        while self._ledger.has_news and len(self._unwritten) < WRITE_BATCHES_MAX:
            batch = self._ledger.take()
            self._unwritten.append(batch.to_bytes())
            if self._follower:
                self._follower.told(batch)

    def _add_batches(self, commands: Pipeline) -> None:
        for batch in self._unwritten:
            commands.xadd(self._key, {EVENTS_FIELD: batch}, maxlen=STREAM_BATCHES_MAX, approximate=True)
        if self._unwritten:
            commands.pexpire(self._key, round(STREAM_EXPIRY_S * 1000))


def _raise_first(replies: Sequence[Any]) -> None:
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
