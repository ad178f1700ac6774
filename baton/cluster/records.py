"""Records in Redis under a lease: each is written again and again by whom it describes, and read by all others.

A set holds the ids, and a key for each holds its record and expires with its lease. All keys start with
`{PREFIX}:`, so that they lie in one slot of a Redis Cluster. Redis may vanish and come back empty at any
time: writers go on and announce themselves anew, watchers keep what they last saw.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton.clock import Clock, monotonic
from baton.cluster.lease import Lease, Repeater
from baton.cluster.redis_client import describe
from baton.errors import ClusterError

log = logging.getLogger(__name__)

FORGET_IF_OURS = """
if redis.call('GET', KEYS[2]) == ARGV[2] then
  redis.call('DEL', KEYS[2])
  redis.call('SREM', KEYS[1], ARGV[1])
end
"""
READ_AND_PRUNE = """
local since = redis.call('GET', KEYS[2]) or ARGV[2]
redis.call('SET', KEYS[2], since, 'EX', 60)
local records = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local record = redis.call('GET', ARGV[1] .. id)
  if record then records[#records + 1] = record else redis.call('SREM', KEYS[1], id) end
end
return {since, records}
"""
"""Also returns what tells one life of Redis from the next: a mark, made by whoever first misses it."""
Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class RecordKind(Generic[Record]):
    name: str
    """In keys and log lines."""
    type: type[Record]
    id_of: Callable[[Record], str]

    def parse(self, texts: Iterable[str]) -> list[Record]:
        """Leaves out what some other version wrote and this one cannot read."""
        records = []
        for text in texts:
            try:
                records.append(self.type.model_validate_json(text))
            except ValidationError:
                log.debug("a %s's record cannot be read and is left out", self.name)
        return records

    def merge(self, known: Iterable[Record], announced: Iterable[Record], *, is_holding: bool) -> tuple[Record, ...]:
        """Who is there, in the order of their ids. While holding - Redis was away and may have come back empty -
        one that is missing has perhaps only not announced itself again yet, and stays."""
        found = {self.id_of(record): record for record in known} if is_holding else {}
        found |= {self.id_of(record): record for record in announced}
        return tuple(found[record_id] for record_id in sorted(found))


@dataclass(frozen=True, slots=True)
class Keys:
    prefix: str
    kind: str

    @property
    def ids(self) -> str:
        return f"{{{self.prefix}}}:{self.kind}s"

    @property
    def since(self) -> str:
        return f"{{{self.prefix}}}:{self.kind}s-since"

    def record(self, record_id: str) -> str:
        return f"{{{self.prefix}}}:{self.kind}:{record_id}"


class Announcement(Generic[Record]):
    """One record's place in the cluster.

    `describe_self` gives it as of now, at every heartbeat. The client stays the caller's.
    """

    def __init__(
        self,
        redis: Redis,
        key_prefix: str,
        kind: RecordKind[Record],
        describe_self: Callable[[], Record],
        lease: Lease,
    ) -> None:
        self._redis, self._keys, self._kind, self._lease = redis, Keys(key_prefix, kind.name), kind, lease
        self._describe_self = describe_self
        self._written: tuple[str, str] | None = None
        self._heartbeat = Repeater(self._write, lease.heartbeat_s, lease, f"Announcing this {kind.name}")

    async def start(self) -> None:
        """Announces it, and again at every heartbeat. Raises ClusterError if the first time fails."""
        try:
            await self._write()
        except (RedisError, OSError) as error:
            raise ClusterError(f"This {self._kind.name} could not be announced in Redis: {describe(error)}.") from None
        self._heartbeat.start()

    async def announce(self) -> None:
        """Tells the cluster now, for instance that the state changed; if Redis is away the heartbeats will."""
        with contextlib.suppress(RedisError, OSError):
            await self._write()

    async def close(self) -> None:
        """Idempotent. Takes the record back, unless its next life has already written its own."""
        await self._heartbeat.close()
        if self._written is not None:
            record_id, text = self._written
            with contextlib.suppress(RedisError, OSError):  # then the lease runs out instead
                await self._redis.eval(FORGET_IF_OURS, 2, self._keys.ids, self._keys.record(record_id), record_id, text)
            self._written = None

    async def _write(self) -> None:
        record = self._describe_self()
        record_id, text = self._kind.id_of(record), record.model_dump_json()
        async with self._redis.pipeline(transaction=True) as commands:
            commands.sadd(self._keys.ids, record_id)
            commands.set(self._keys.record(record_id), text, px=round(self._lease.expiry_s * 1000))
            await commands.execute()
        self._written = (record_id, text)


class Watch(Generic[Record]):
    """All records of a kind as Redis last told them. The client stays the caller's."""

    def __init__(
        self, redis: Redis, key_prefix: str, kind: RecordKind[Record], lease: Lease, clock: Clock = monotonic
    ) -> None:
        self._redis, self._keys, self._kind, self._lease = redis, Keys(key_prefix, kind.name), kind, lease
        self._clock = clock
        self._records: tuple[Record, ...] = ()
        self._announced: tuple[Record, ...] = ()
        self._answered_s = float("-inf")
        self._hold_until_s = float("-inf")
        self._since = ""
        self._news = asyncio.Event()
        self._polling = Repeater(self._poll, lease.poll_s, lease, f"Reading the list of {kind.name}s")

    @property
    def records(self) -> Sequence[Record]:
        """In the order of their ids."""
        return self._records

    def announced_within(self, seconds: float) -> Sequence[Record]:
        """Those that Redis listed when it last answered; none where that is longer ago."""
        return self._announced if self._clock() - self._answered_s <= seconds else ()

    @property
    def is_stale(self) -> bool:
        """Whether Redis is away, so that `records` is what was true when it last answered."""
        return self._polling.is_failing

    async def changed(self) -> None:
        """Returns when anything in `records` differs from what it was at the call."""
        await self._news.wait()

    async def start(self) -> None:
        """Returns when `records` is known. Raises ClusterError if Redis does not tell."""
        try:
            await self._poll()
        except (RedisError, OSError) as error:
            raise ClusterError(
                f"The list of {self._kind.name}s could not be read from Redis: {describe(error)}."
            ) from None
        self._polling.start()

    async def close(self) -> None:
        """Idempotent."""
        await self._polling.close()

    async def _poll(self) -> None:
        since, texts = await self._redis.eval(
            READ_AND_PRUNE, 2, self._keys.ids, self._keys.since, self._keys.record(""), secrets.token_hex(8)
        )
        now_s = self._clock()
        came_back_empty = bool(self._since) and since != self._since  # perhaps between two polls, so that none failed
        if self.is_stale or came_back_empty:
            self._hold_until_s = now_s + self._lease.expiry_s
        self._since = since
        self._announced, self._answered_s = tuple(self._kind.parse(texts)), now_s
        records = self._kind.merge(self._records, self._announced, is_holding=now_s < self._hold_until_s)
        if records != self._records:
            self._records = records
            self._news.set()
            self._news = asyncio.Event()
