"""The router's side of KV events: many workers' streams, read in one call."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.client import NEVER_DECODE

from baton.cluster.cache_events import CacheEvents, MalformedEvents, stream_key
from baton.cluster.cache_publisher import EVENTS_FIELD
from baton.ids import WorkerId

READ_BATCHES_MAX = 1024
"""In one read, of all streams together, or 4 of each: about 15 ms of work."""
BLOCK_S = 0.5
"""Longest that one read waits for news; well below the client's own patience."""
START = b"0-0"


class Published(NamedTuple):
    worker_id: WorkerId
    events: CacheEvents


class CacheEventReader:
    """Where one router has got to in each stream. The client stays the caller's; every method that asks Redis
    raises RedisError or OSError, and leaves the positions as they were."""

    def __init__(self, redis: Redis, key_prefix: str) -> None:
        self._redis, self._key_prefix = redis, key_prefix
        self._positions: dict[WorkerId, bytes] = {}
        self.malformed = 0
        """Entries that were no batch of events, and were skipped."""

    async def follow(self, worker_ids: Iterable[WorkerId]) -> None:
        """`read` returns what these publish from now on."""
        new = [worker_id for worker_id in worker_ids if worker_id not in self._positions]
        self._positions |= await self._last_entries(new)

    def unfollow(self, worker_id: WorkerId) -> None:
        self._positions.pop(worker_id, None)

    async def resume(self) -> set[WorkerId]:
        """After Redis was away: whose stream has not got as far as we had read it, because Redis came back without
        it. Such a stream is read from its start; what else was lost must be had from the worker."""
        before = dict(self._positions)
        last = await self._last_entries(before)
        lost = {worker_id for worker_id, entry in last.items() if _order(entry) < _order(before[worker_id])}
        lost &= self._positions.keys()  # else unfollowed meanwhile
        self._positions |= dict.fromkeys(lost, START)
        return lost

    async def read(self, wait_s: float = BLOCK_S) -> list[Published]:
        """What is new, in each stream's order; waits up to `wait_s`, at least a millisecond, while nothing is.
        Somebody must be followed."""
        assert self._positions
        count = max(4, READ_BATCHES_MAX // len(self._positions))
        keys = {stream_key(self._key_prefix, worker_id).encode(): worker_id for worker_id in self._positions}
        streams: Any = await self._redis.execute_command(  # type: ignore[no-untyped-call]
            *("XREAD", "COUNT", count, "BLOCK", max(1, round(wait_s * 1000))),
            *("STREAMS", *keys, *self._positions.values()),
            **{NEVER_DECODE: True},
        )
        published = []
        for key, entries in dict(streams or ()).items():
            worker_id = keys[key]
            if worker_id in self._positions and entries:  # else unfollowed meanwhile
                self._positions[worker_id] = entries[-1][0]
                published += [Published(worker_id, events) for _, fields in entries if (events := self._parse(fields))]
        return published

    def _parse(self, fields: Mapping[bytes, bytes]) -> CacheEvents | None:
        try:
            return CacheEvents.from_bytes(fields[EVENTS_FIELD])
        except (KeyError, MalformedEvents):
            self.malformed += 1  # the number that it should have had is missing now: a gap
            return None

    async def _last_entries(self, worker_ids: Iterable[WorkerId]) -> dict[WorkerId, bytes]:
        """The id of each stream's last entry, one round trip for all."""
        worker_ids = list(worker_ids)
        async with self._redis.pipeline(transaction=False) as commands:
            for worker_id in worker_ids:
                commands.execute_command(
                    *("XREVRANGE", stream_key(self._key_prefix, worker_id), "+", "-", "COUNT", 1),
                    **{NEVER_DECODE: True},
                )
            found: list[Any] = await commands.execute() if worker_ids else []
        return {
            worker_id: entries[0][0] if entries else START for worker_id, entries in zip(worker_ids, found, strict=True)
        }


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
