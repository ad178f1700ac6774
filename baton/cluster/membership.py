"""Who is in the cluster: workers announce themselves in Redis under a lease, and routers watch.

A set holds the workers' ids, and a key for each worker holds its record and expires with its lease. All
keys start with `{PREFIX}:`, so that they lie in one slot of a Redis Cluster. Redis may vanish and come
back empty at any time: workers go on and announce themselves anew, watchers keep what they last saw.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton.clock import Clock, monotonic
from baton.cluster.lease import Lease, Repeater
from baton.cluster.redis_client import describe
from baton.cluster.worker_info import WorkerInfo
from baton.errors import ClusterError

log = logging.getLogger(__name__)

FORGET_IF_OURS = """
if redis.call('GET', KEYS[2]) == ARGV[2] then
  redis.call('DEL', KEYS[2])
  redis.call('SREM', KEYS[1], ARGV[1])
end
"""
READ_AND_PRUNE = """
local records = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local record = redis.call('GET', ARGV[1] .. id)
  if record then records[#records + 1] = record else redis.call('SREM', KEYS[1], id) end
end
return records
"""


class Membership:
    """One worker's place in the cluster.

    `describe_worker` gives its record as of now, at every heartbeat. The client stays the caller's.
    """

    def __init__(
        self, redis: Redis, key_prefix: str, describe_worker: Callable[[], WorkerInfo], lease: Lease | None = None
    ) -> None:
        self._redis, self._keys, self._lease = redis, Keys(key_prefix), lease or Lease()
        self._describe_worker = describe_worker
        self._written: tuple[str, str] | None = None
        self._heartbeat = Repeater(self._write, self._lease.heartbeat_s, self._lease, "Announcing this worker")

    async def start(self) -> None:
        """Announces the worker, and again at every heartbeat. Raises ClusterError if the first time fails."""
        try:
            await self._write()
        except (RedisError, OSError) as error:
            raise ClusterError(f"This worker could not be announced in Redis: {describe(error)}.") from None
        self._heartbeat.start()

    async def announce(self) -> None:
        """Tells the cluster now, for instance that the state changed; if Redis is away the heartbeats will."""
        with contextlib.suppress(RedisError, OSError):
            await self._write()

    async def close(self) -> None:
        """Idempotent. Takes the record back, unless the worker's next life has already written its own."""
        await self._heartbeat.close()
        if self._written is not None:
            worker_id, record = self._written
            with contextlib.suppress(RedisError, OSError):  # then the lease runs out instead
                await self._redis.eval(
                    FORGET_IF_OURS, 2, self._keys.ids, self._keys.record(worker_id), worker_id, record
                )
            self._written = None

    async def _write(self) -> None:
        worker = self._describe_worker()
        record = worker.model_dump_json()
        async with self._redis.pipeline(transaction=True) as commands:
            commands.sadd(self._keys.ids, worker.worker_id)
            commands.set(self._keys.record(worker.worker_id), record, px=round(self._lease.expiry_s * 1000))
            await commands.execute()
        self._written = (worker.worker_id, record)


class MembershipWatch:
    """The cluster's workers as Redis last told them. The client stays the caller's."""

    def __init__(self, redis: Redis, key_prefix: str, lease: Lease | None = None, clock: Clock = monotonic) -> None:
        self._redis, self._keys, self._lease, self._clock = redis, Keys(key_prefix), lease or Lease(), clock
        self._workers: tuple[WorkerInfo, ...] = ()
        self._hold_until_s = float("-inf")
        self._news = asyncio.Event()
        self._polling = Repeater(self._poll, self._lease.poll_s, self._lease, "Reading the list of workers")

    def workers(self) -> Sequence[WorkerInfo]:
        """In the order of their ids."""
        return self._workers

    @property
    def is_stale(self) -> bool:
        """Whether Redis is away, so that `workers` is what was true when it last answered."""
        return self._polling.is_failing

    async def changed(self) -> None:
        """Returns when anything in `workers` differs, loads included, from what it was at the call."""
        await self._news.wait()

    async def start(self) -> None:
        """Returns when `workers` is known. Raises ClusterError if Redis does not tell."""
        try:
            await self._poll()
        except (RedisError, OSError) as error:
            raise ClusterError(f"The list of workers could not be read from Redis: {describe(error)}.") from None
        self._polling.start()

    async def close(self) -> None:
        """Idempotent."""
        await self._polling.close()

    async def _poll(self) -> None:
        records = await self._redis.eval(READ_AND_PRUNE, 1, self._keys.ids, self._keys.record(""))
        now_s = self._clock()
        if self.is_stale:
            self._hold_until_s = now_s + self._lease.expiry_s
        workers = merge(self._workers, parse(records), is_holding=now_s < self._hold_until_s)
        if workers != self._workers:
            self._workers = workers
            self._news.set()
            self._news = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Keys:
    prefix: str

    @property
    def ids(self) -> str:
        return f"{{{self.prefix}}}:workers"

    def record(self, worker_id: str) -> str:
        return f"{{{self.prefix}}}:worker:{worker_id}"


def merge(known: Iterable[WorkerInfo], announced: Iterable[WorkerInfo], *, is_holding: bool) -> tuple[WorkerInfo, ...]:
    """Who is there. While holding - Redis was away and may have come back empty - a worker that is missing
    has perhaps only not announced itself again yet, and stays."""
    found = {worker.worker_id: worker for worker in known} if is_holding else {}
    found |= {worker.worker_id: worker for worker in announced}
    return tuple(found[worker_id] for worker_id in sorted(found))


def parse(records: Iterable[str]) -> list[WorkerInfo]:
    """Leaves out what a worker of some other version wrote and this one cannot read."""
    workers = []
    for record in records:
        try:
            workers.append(WorkerInfo.model_validate_json(record))
        except ValidationError:
            log.debug("a worker's record cannot be read and is left out")
    return workers
