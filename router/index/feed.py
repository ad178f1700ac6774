"""Keeps the prefix index true: follows the KV events of all workers, and pulls a snapshot where some are missing."""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from baton.clock import Clock, monotonic
from baton.cluster.cache_events import CacheEvents
from baton.cluster.cache_reader import Published
from baton.cluster.lease import Lease
from baton.cluster.redis_client import describe
from baton.cluster.worker_info import WorkerInfo
from baton.ids import WorkerId
from router.index.prefix_index import Applied, Doubt, PrefixIndex
from router.index.snapshots import SnapshotFailed, SnapshotSource, restore_from
from router.worker_pool import Membership

log = logging.getLogger(__name__)


class EventSource(Protocol):
    """baton.cluster.cache_reader.CacheEventReader, or a script."""

    async def follow(self, worker_ids: Iterable[WorkerId]) -> None: ...

    def unfollow(self, worker_id: WorkerId) -> None: ...

    async def resume(self) -> set[WorkerId]: ...

    async def read(self) -> list[Published]: ...


@dataclass(frozen=True, slots=True)
class FeedPace:
    """How fast the index follows, and how hard it tries."""

    linger_s: float = 0.01
    """Between two reads, so that a read finds batches of many workers."""
    look_s: float = 1.0
    """Between two looks at the workers' own word on how far their events are, at most."""
    lag_max_s: float = 3.0
    """How long an event that its worker says it made may take to be read; past it, it is taken for lost."""
    tidy_s: float = 0.1
    slice_pause_s: float = 0.005
    """Between two slices of clearing away."""
    snapshots_max: int = 8
    """Pulled at the same time."""
    snapshot_s: float = 40.0
    """Longest that one may take."""
    refill_s: float = 60.0
    """Between two snapshots of a worker for which the index had no room."""
    retry: Lease = field(default_factory=lambda: Lease(retry_max_s=10.0))


KEPT_BATCHES_MAX = 1024
"""Of one worker, while its snapshot is on its way: 32 MiB at the very most. When more come, another is pulled."""


@dataclass(slots=True)
class FeedCounts:
    event_batches: int = 0
    """Applied in their order."""
    event_blocks: int = 0
    """Changes in them."""
    gaps: int = 0
    snapshots: int = 0
    snapshot_failures: int = 0
    outages: int = 0
    """How often Redis went away."""


@dataclass(slots=True, eq=False)
class _Worker:
    """One life of a worker."""

    info: WorkerInfo
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Its first snapshot is there, or failed to come."""
    kept: deque[CacheEvents] = field(default_factory=lambda: deque(maxlen=KEPT_BATCHES_MAX))
    """What came while a snapshot was on its way."""
    pulling: asyncio.Task[None] | None = None
    pulled_s: float = float("-inf")
    lag_sequence: int = 0
    lag_since_s: float | None = None

    @property
    def is_pulling(self) -> bool:
        return self.pulling is not None and not self.pulling.done()


class IndexFeed:
    """Drives a PrefixIndex; lives on the loop. What it is given stays the caller's.

    A worker is *stale* while the index may be wrong about it; the index then says what it last knew and what this
    router sent there, `health` and the metrics say so, and a snapshot is tried for until there is one.
    """

    def __init__(
        self,
        index: PrefixIndex,
        membership: Membership,
        events: EventSource,
        snapshots: SnapshotSource,
        clock: Clock = monotonic,
        pace: FeedPace | None = None,
    ) -> None:
        self._index, self._membership, self._events, self._snapshots = index, membership, events, snapshots
        self._clock, self._pace = clock, pace or FeedPace()
        self.counts = FeedCounts()
        self._workers: dict[WorkerId, _Worker] = {}
        self._unfollowed: set[WorkerId] = set()
        """Members whose place in their stream is not known yet."""
        self._is_redis_away = False
        self._anybody = asyncio.Event()
        self._pulls = asyncio.Semaphore(self._pace.snapshots_max)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closed = False

    async def start(self) -> None:
        """The index begins to fill; `warm` waits for it."""
        self._reconcile()
        doing = {"follow members": self._follow_members, "follow KV events": self._follow_events, "tidy": self._tidy}
        self._tasks = [asyncio.create_task(act(), name=f"prefix index: {what}") for what, act in doing.items()]

    async def close(self) -> None:
        """Idempotent."""
        self._is_closed = True  # because a cancellation may get lost in Redis's client
        pulls = [worker.pulling for worker in self._workers.values() if worker.pulling]
        for task in (*self._tasks, *pulls):
            task.cancel()
        await asyncio.gather(*self._tasks, *pulls, return_exceptions=True)

    async def warm(self, timeout_s: float) -> bool:
        """Returns when the snapshot of every worker that is a member now has come, or has failed to at the first
        try; False if that is not so within `timeout_s`."""
        waiting = [worker.settled.wait() for worker in self._workers.values()]
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*waiting)
        except TimeoutError:
            return False
        return True

    def health(self) -> dict[str, Any]:
        """For the detail of /health: whether the index is fresh, and if not, for whom, why and since when."""
        now_s = self._clock()
        stale = {
            worker_id: {
                "reasons": [doubt.value for doubt in freshness.doubts],
                "stale_s": round(now_s - freshness.since_s, 3),
            }
            for worker_id, freshness in self._index.stale().items()
        }
        return {
            "fresh": not stale,
            "blocks": len(self._index),
            "workers": len(self._workers),
            "stale_workers": stale,
            "redis_away": self._is_redis_away,
            **asdict(self.counts),
        }

    @property
    def stale_s(self) -> float:
        """For how long the worker that has been stale the longest has been; 0 while the index is fresh."""
        since_s = [freshness.since_s for freshness in self._index.stale().values()]
        return self._clock() - min(since_s) if since_s else 0.0

    # ---- members

    async def _follow_members(self) -> None:
        while not self._is_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.look_s):
                    await self._membership.changed()
            self._reconcile()
            self._look_for_lost_events()
            self._refill()

    def _reconcile(self) -> None:
        members = {worker.worker_id: worker for worker in self._membership.workers()}
        for worker_id in self._workers.keys() - members.keys():
            self._forget(worker_id)
            self._index.leave(worker_id)
        for worker_id, info in members.items():
            known = self._workers.get(worker_id)
            if known is not None and known.info.epoch == info.epoch:
                known.info = info
            else:
                self._begin(info)

    def _begin(self, info: WorkerInfo) -> None:
        self._forget(info.worker_id)
        self._index.join(info.worker_id, info.epoch)
        if self._is_redis_away:
            self._index.doubt(info.worker_id, Doubt.REDIS_AWAY)
        self._workers[info.worker_id] = _Worker(info)
        self._unfollowed.add(info.worker_id)
        self._anybody.set()

    def _forget(self, worker_id: WorkerId) -> None:
        if worker := self._workers.pop(worker_id, None):
            worker.settled.set()
            if worker.pulling:
                worker.pulling.cancel()
            self._unfollowed.discard(worker_id)
            self._events.unfollow(worker_id)

    def _look_for_lost_events(self) -> None:
        """A worker's record says how far its events are. What does not come is lost, and nothing else may ever tell."""
        now_s = self._clock()
        for worker_id, worker in self._workers.items():
            known = self._index.sequence_of(worker_id)
            if known is None or worker.is_pulling or known >= worker.info.cache_sequence:
                worker.lag_since_s = None
            elif worker.lag_since_s is None or known >= worker.lag_sequence:
                worker.lag_since_s, worker.lag_sequence = now_s, worker.info.cache_sequence
            elif now_s - worker.lag_since_s > self._pace.lag_max_s:
                worker.lag_since_s = None
                self._missed(worker)

    def _refill(self) -> None:
        """Where the index had no room, and has some now."""
        for worker_id, worker in self._workers.items():
            is_due = self._clock() - worker.pulled_s > self._pace.refill_s and not worker.is_pulling
            if is_due and Doubt.INDEX_FULL in self._index.freshness(worker_id).doubts and self._index.has_room:
                self._pull(worker)

    # ---- events

    async def _follow_events(self) -> None:
        failures = 0
        while not self._is_closed:
            await self._anybody.wait()
            try:
                await self._read()
            except Exception as error:  # a service loop: whatever it was, the next try may succeed
                failures += 1
                self._redis_went(error)
                await asyncio.sleep(self._pace.retry.retry_delay_s(failures, random.random()))
            else:
                failures = 0
                await asyncio.sleep(self._pace.linger_s)

    async def _read(self) -> None:
        if self._is_redis_away:
            for worker_id in await self._events.resume() & self._workers.keys():
                self._missed(self._workers[worker_id])
        await self._begin_streams()
        if not self._workers:
            self._anybody.clear()
            return
        published = await self._events.read()
        self._redis_answered()
        for worker_id, events in published:
            self._take(worker_id, events)

    async def _begin_streams(self) -> None:
        """A worker's snapshot is asked for only when its place in its stream is known, so that nothing falls between
        the two."""
        new = [self._workers[worker_id] for worker_id in self._unfollowed]
        if new:
            await self._events.follow([worker.info.worker_id for worker in new])
        for worker in new:
            worker_id = worker.info.worker_id
            if self._workers.get(worker_id) is worker:
                self._unfollowed.discard(worker_id)
                self._pull(worker)
            elif worker_id not in self._workers:
                self._events.unfollow(worker_id)

    def _take(self, worker_id: WorkerId, events: CacheEvents) -> None:
        worker = self._workers.get(worker_id)
        applied = self._index.apply(worker_id, events)
        if worker is None or applied is Applied.FOREIGN:
            return  # of a life that is over, or one that the membership will tell of: then a snapshot has it
        if applied is Applied.APPLIED:
            self.counts.event_batches += 1
            self.counts.event_blocks += events.blocks
        if worker.is_pulling:
            worker.kept.append(events)
        elif applied is Applied.GAP:
            self._missed(worker)
            worker.kept.append(events)

    def _redis_went(self, error: Exception) -> None:
        if not self._is_redis_away:
            self._is_redis_away = True
            self.counts.outages += 1
            log.warning("KV events cannot be read from Redis (%s); placing by what is known", describe(error))
        for worker_id in self._workers:
            self._index.doubt(worker_id, Doubt.REDIS_AWAY)

    def _redis_answered(self) -> None:
        if not self._is_redis_away:
            return
        self._is_redis_away = False
        log.info("KV events are read from Redis again")
        for worker_id in self._workers:
            self._index.trust(worker_id, Doubt.REDIS_AWAY)

    # ---- snapshots

    def _missed(self, worker: _Worker) -> None:
        self.counts.gaps += 1
        self._index.doubt(worker.info.worker_id, Doubt.EVENTS_MISSING)
        self._pull(worker)

    def _pull(self, worker: _Worker) -> None:
        if not worker.is_pulling:
            worker.kept.clear()
            name = f"prefix index: snapshot of {worker.info.worker_id}"
            worker.pulling = asyncio.create_task(self._keep_pulling(worker), name=name)

    async def _keep_pulling(self, worker: _Worker) -> None:
        failures = 0
        while not self._is_closed:
            try:
                async with self._pulls, asyncio.timeout(self._pace.snapshot_s):
                    await restore_from(self._snapshots, worker.info, self._index)
            except (SnapshotFailed, TimeoutError) as error:
                failures += 1
                self._failed(worker, failures, error)
            else:
                self.counts.snapshots += 1
                worker.pulled_s = self._clock()
                worker.settled.set()
                if self._catch_up(worker):
                    return
                failures += 1
                self.counts.gaps += 1
            await asyncio.sleep(self._pace.retry.retry_delay_s(failures, random.random()))

    def _catch_up(self, worker: _Worker) -> bool:
        """Applies what came meanwhile. False if batches are missing between the snapshot and that."""
        kept = list(worker.kept)
        worker.kept.clear()
        return all(self._index.apply(worker.info.worker_id, events) is not Applied.GAP for events in kept)

    def _failed(self, worker: _Worker, failures: int, error: Exception) -> None:
        self.counts.snapshot_failures += 1
        worker.settled.set()
        if failures == 1:
            reason = str(error) or "no answer in time"
            log.warning("no snapshot of the cache of %s (%s); trying on", worker.info.worker_id, reason)

    # ---- upkeep

    async def _tidy(self) -> None:
        while not self._is_closed:
            has_more = self._index.tidy()
            await asyncio.sleep(self._pace.slice_pause_s if has_more else self._pace.tidy_s)
