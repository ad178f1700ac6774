"""The index over real Redis streams and real gRPC; in the end it equals what the workers hold."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import psutil
import pytest
from caching_worker import CachingWorker, names
from listed_membership import ListedMembership
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from baton.clock import ManualClock
from baton.cluster.cache_events import CacheChanges, CacheEvents, stream_key
from baton.cluster.cache_reader import CacheEventReader, Published
from baton.cluster.lease import Lease
from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from baton.rpc import worker_pb2
from router.index.feed import FeedPace, IndexFeed
from router.index.metrics import IndexCollector
from router.index.prefix_index import EXPECT_S, Doubt, PrefixIndex
from router.index.snapshots import GrpcSnapshots

PATIENCE_S = 60.0
FAST = FeedPace(
    linger_s=0.001,
    look_s=0.02,
    lag_max_s=0.1,
    tidy_s=0.01,
    slice_pause_s=0,
    refill_s=0.05,
    retry=Lease(retry_max_s=0.05),
)
UNIVERSE = names(*range(200))


class Rig:
    def __init__(self, redis: Redis, key_prefix: str, workers: Sequence[CachingWorker], blocks_max: int) -> None:
        self.workers = workers
        self.membership = ListedMembership([worker.info for worker in workers])
        self.clock = ManualClock()
        self.index = PrefixIndex(blocks_max, self.clock)
        self.feed = IndexFeed(
            self.index, self.membership, CacheEventReader(redis, key_prefix), GrpcSnapshots(timeout_s=5), pace=FAST
        )

    def announce(self, *workers: CachingWorker) -> None:
        """The workers' heartbeats, as the membership watch would tell of them."""
        self.membership.change([worker.info for worker in workers])

    def known(self, worker: CachingWorker) -> dict[BlockHash, Tier]:
        slot = self.index.slot_of(worker.worker_id)
        found: dict[BlockHash, Tier] = {}
        for name in UNIVERSE:
            if length := self.index.match([name]).get(slot if slot is not None else -1):
                found[name] = "hbm" if length.hbm else "ddr" if length.ddr else "ssd"
        return found

    def is_true(self) -> bool:
        self.index.check_integrity()
        return not self.index.stale() and all(self.known(worker) == worker.held for worker in self.workers)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110 - nobody but tests waits for this, so there is no event
                await asyncio.sleep(0.001)


@asynccontextmanager
async def feeding(
    redis: Redis, key_prefix: str, *workers: CachingWorker, blocks_max: int = 10_000, wait: bool = True
) -> AsyncIterator[Rig]:
    rig = Rig(redis, key_prefix, workers, blocks_max)
    await rig.feed.start()
    try:
        if wait:
            assert await rig.feed.warm(PATIENCE_S)
        yield rig
    finally:
        await rig.feed.close()
        await rig.feed.close()


@asynccontextmanager
async def client_for(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = redis_client(server.url)
    try:
        yield client
    finally:
        await client.aclose()


def kill(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGKILL)
    psutil.Process(server.pid).wait(PATIENCE_S)


def test_a_new_router_knows_what_workers_hold_and_follows_what_they_do(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as second,
        ):
            first.store(*UNIVERSE[:20])
            first.store(*UNIVERSE[20:25], tier="ddr")
            async with feeding(redis, key_prefix, first, second) as rig:
                assert rig.is_true() and rig.feed.health()["blocks"] == 25, "warm: with what was there before it"
                first.publisher.record(CacheChanges(moved={"ssd": UNIVERSE[:3]}, removed=UNIVERSE[3:6]))
                second.store(*UNIVERSE[:50])
                await rig.until(rig.is_true)
                assert rig.feed.counts.gaps == 0 and (first.snapshots, second.snapshots) == (1, 1)
                assert rig.feed.counts.event_batches == 2 and rig.feed.counts.event_blocks == 56

    asyncio.run(main())


def test_workers_come_and_go(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as second,
            feeding(redis, key_prefix) as rig,
        ):
            first.store(*UNIVERSE[:5])
            second.store(*UNIVERSE[:9])
            rig.announce(first, second)
            rig.workers = [first, second]
            await rig.until(lambda: len(rig.feed.health()["stale_workers"]) == 0 and rig.is_true())
            rig.announce(second)
            await rig.until(lambda: first.worker_id not in rig.index)
            first.store(*UNIVERSE[5:9])
            second.remove(UNIVERSE[8])
            rig.workers = [second]
            await rig.until(rig.is_true)
            assert rig.known(first) == {} and rig.feed.health()["workers"] == 1
            rig.announce()
            await rig.until(lambda: len(rig.index) == 0)

    asyncio.run(main())


def test_events_that_come_while_a_snapshot_is_on_its_way_are_applied_after_it(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis, CachingWorker(redis, key_prefix, "a") as worker:
            worker.store(*UNIVERSE[:10])
            worker.gate = asyncio.Event()
            async with feeding(redis, key_prefix, worker, wait=False) as rig:
                assert not await rig.feed.warm(0.01)
                await worker.asked.wait()
                worker.remove(*UNIVERSE[:5])  # the snapshot, taken already, says that they are there
                worker.store(*UNIVERSE[10:15])
                await rig.until(lambda: UNIVERSE[14] in rig.known(worker))  # believed meanwhile
                assert rig.index.freshness(worker.worker_id).doubts[0] is Doubt.NO_SNAPSHOT
                worker.gate.set()
                assert await rig.feed.warm(PATIENCE_S)
                assert rig.is_true() and worker.snapshots == 1

    asyncio.run(main())


def test_a_gap_is_filled_by_a_snapshot(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as worker,
            feeding(redis, key_prefix, worker) as rig,
        ):
            ledger = worker.publisher._ledger
            ledger.record(CacheChanges({"hbm": UNIVERSE[:5]}))
            ledger.take()  # and the batch is never written
            worker.failures = 2
            worker.store(*UNIVERSE[5:7])
            await rig.until(lambda: rig.feed.counts.gaps == 1)
            assert rig.index.freshness(worker.worker_id).doubts == (Doubt.EVENTS_MISSING,)
            await rig.until(rig.is_true)
            assert worker.snapshots == 2 and rig.feed.counts.snapshot_failures == 2

    asyncio.run(main())


def test_a_last_batch_that_got_lost_is_noticed_by_the_workers_record(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as worker,
            feeding(redis, key_prefix, worker) as rig,
        ):
            rig.feed._clock = asyncio.get_running_loop().time
            ledger = worker.publisher._ledger
            ledger.record(CacheChanges({"hbm": UNIVERSE[:5]}))
            ledger.take()  # and the batch is never written
            assert rig.known(worker) == {}
            rig.announce(worker)
            await rig.until(rig.is_true)
            assert rig.feed.counts.gaps == 1 and worker.snapshots == 2

    asyncio.run(main())


def test_a_worker_that_begins_anew_is_not_taken_for_its_old_self(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis, CachingWorker(redis, key_prefix, "a") as worker:
            worker.store(*UNIVERSE[:30])
            async with feeding(redis, key_prefix, worker) as rig:
                assert len(rig.known(worker)) == 30
                await worker.begin_anew()
                worker.store(*UNIVERSE[28:32])  # read before the membership tells of the new life, and not believed
                old = CacheEvents.of("its old epoch", 99, CacheChanges({"hbm": UNIVERSE[50:60]}))
                await redis.xadd(stream_key(key_prefix, worker.worker_id), {b"e": old.to_bytes()})
                rig.announce(worker)
                await rig.until(rig.is_true)
                worker.remove(UNIVERSE[31])
                await rig.until(rig.is_true)
                assert len(rig.known(worker)) == 3

    asyncio.run(main())


def test_redis_killed_and_back_empty(key_prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main(server: EmbeddedRedis) -> None:
        async with (
            client_for(server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as second,
        ):
            first.store(*UNIVERSE[:10])
            async with feeding(redis, key_prefix, first, second) as rig:
                first.store(UNIVERSE[10])
                await rig.until(rig.is_true)
                kill(server)
                await rig.until(lambda: bool(rig.feed.health()["redis_away"]))
                health = rig.feed.health()
                assert not health["fresh"] and health["stale_workers"]["a"]["reasons"] == ["Redis is away"]
                assert len(rig.known(first)) == 11, "the last state stays"
                rig.index.expect([second.worker_id], UNIVERSE[100:102])
                rig.clock.advance(2 * EXPECT_S)
                first.store(*UNIVERSE[11:20])
                second.store(*UNIVERSE[50:60])
                await asyncio.sleep(0.05)  # tidied meanwhile
                assert len(rig.known(second)) == 2, "what was sent there is all that is known of it"
                assert rig.feed.health()["stale_workers"]["b"]["stale_s"] >= 2 * EXPECT_S
                server.start()
                await rig.until(lambda: rig.clock.advance(EXPECT_S) or rig.is_true())
                second.remove(*UNIVERSE[50:55])
                await rig.until(rig.is_true)
                assert rig.feed.counts.outages == 1

    with EmbeddedRedis() as server:
        asyncio.run(main(server))
    assert len([line for line in caplog.messages if "KV events cannot be read" in line]) == 1


def test_a_worker_that_does_not_answer_keeps_nobody_waiting(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as mute,
        ):
            first.store(*UNIVERSE[:3])
            mute.store(*UNIVERSE[:3])
            await mute.hang_up()
            async with feeding(redis, key_prefix, first, mute) as rig:
                assert len(rig.known(first)) == 3 and set(rig.feed.health()["stale_workers"]) == {"b"}
                await mute.listen()
                await rig.until(rig.is_true)

    asyncio.run(main())


class Garbled(CachingWorker):
    """Its first answers are wrong, each in another way."""

    async def GetCacheSnapshot(self, request: object, context: object) -> AsyncIterator[worker_pb2.CacheSnapshot]:  # noqa: N802
        self.snapshots += 1
        if self.snapshots == 1:
            return
        if self.snapshots == 2:
            yield worker_pb2.CacheSnapshot(epoch="another", sequence=7)
        elif self.snapshots == 3:
            yield worker_pb2.CacheSnapshot(epoch=self.epoch, blocks=[{"tier": 1, "block_hashes": b"short"}])
        else:
            async for message in super().GetCacheSnapshot(request, context):
                yield message


def test_a_snapshot_that_makes_no_sense_is_asked_for_again(
    redis_server: EmbeddedRedis, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis, Garbled(redis, key_prefix, "a") as worker:
            worker.store(*UNIVERSE[:3])
            async with feeding(redis, key_prefix, worker) as rig:
                await rig.until(rig.is_true)
                assert rig.feed.counts.snapshot_failures == 3 and rig.feed.counts.snapshots == 1

    asyncio.run(main())
    assert len([line for line in caplog.messages if "no snapshot of the cache of a" in line]) == 1


def test_what_did_not_fit_is_asked_for_again_when_there_is_room(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as second,
        ):
            first.store(*UNIVERSE[:40])
            async with feeding(redis, key_prefix, first, second, blocks_max=50) as rig:
                second.store(*UNIVERSE[100:130])
                await rig.until(lambda: len(rig.known(second)) == 10)
                assert rig.feed.health()["stale_workers"]["b"]["reasons"] == ["the index is full"]
                first.remove(*UNIVERSE[:40])
                rig.feed._clock = asyncio.get_running_loop().time
                await rig.until(rig.is_true)

    asyncio.run(main())


def test_metrics_tell_how_fresh_the_index_is(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with (
            client_for(redis_server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as mute,
        ):
            await mute.hang_up()
            first.store(*UNIVERSE[:3])
            async with feeding(redis, key_prefix, first, mute) as rig:
                registry = CollectorRegistry()
                registry.register(IndexCollector(rig.index, rig.feed))

                def value(name: str, **labels: str) -> float | None:
                    return registry.get_sample_value(f"baton_prefix_index_{name}", labels)

                assert value("blocks") == 3 and (value("bytes") or 0) > 100
                assert value("stale_workers", reason="no_snapshot") == 1
                assert value("stale_workers", reason="redis_away") == 0
                assert value("snapshots_total", outcome="restored") == 1
                assert (value("snapshots_total", outcome="failed") or 0) >= 1
                rig.feed._clock = rig.clock
                rig.clock.advance(7)
                assert value("stale_seconds") == 7

    asyncio.run(main())


class ScriptedEvents:
    """An event source that goes away when told, and then says that it lost everything."""

    def __init__(self) -> None:
        self.is_away = False

    async def follow(self, worker_ids: Iterable[WorkerId]) -> None:
        self.followed = set(worker_ids)

    def unfollow(self, worker_id: WorkerId) -> None:
        self.followed.discard(worker_id)

    async def resume(self) -> set[WorkerId]:
        return self.followed

    async def read(self) -> list[Published]:
        await asyncio.sleep(0)
        if self.is_away:
            raise ConnectionError("away")
        return []


def test_a_worker_whose_stream_redis_lost_is_stale_until_its_snapshot(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis, CachingWorker(redis, key_prefix, "a") as worker:
            rig, events = Rig(redis, key_prefix, [worker], 1000), ScriptedEvents()
            rig.feed = IndexFeed(rig.index, rig.membership, events, GrpcSnapshots(timeout_s=5), pace=FAST)
            await rig.feed.start()
            assert await rig.feed.warm(PATIENCE_S)
            events.is_away = True
            await rig.until(lambda: not rig.feed.health()["fresh"])
            worker.store(*UNIVERSE[:5])
            worker.gate = asyncio.Event()
            worker.asked.clear()
            events.is_away = False
            await worker.asked.wait()
            assert rig.index.freshness(worker.worker_id).doubts[-1] is Doubt.EVENTS_MISSING
            worker.gate.set()
            await rig.until(rig.is_true)
            await rig.feed.close()

    asyncio.run(main())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_goes_wrong_the_index_is_true_in_the_end(key_prefix: str, seed: int) -> None:
    """Random changes and faults: lost batches, new lives, deaf workers, Redis killed."""
    print(f"seed {seed}")
    rnd = random.Random(seed)

    async def act(server: EmbeddedRedis, rig: Rig, worker: CachingWorker) -> None:
        event = rnd.random()
        if event < 0.04:
            worker.publisher._ledger.record(CacheChanges({"hbm": tuple(rnd.sample(UNIVERSE, 3))}))
            worker.publisher._ledger.take()
        elif event < 0.08:
            await worker.begin_anew()
        elif event < 0.12:
            worker.failures = 2
        elif event < 0.14:
            kill(server)
            await asyncio.sleep(rnd.uniform(0, 0.1))
            server.start()
        elif event < 0.6:
            worker.store(*rnd.sample(UNIVERSE, 5), tier=rnd.choice(["hbm", "ddr", "ssd"]))
        else:
            worker.remove(*rnd.sample(UNIVERSE, 5))
        rig.announce(*rig.workers)
        await asyncio.sleep(rnd.choice([0, 0, 0.002, 0.01]))

    async def main(server: EmbeddedRedis) -> None:
        async with (
            client_for(server) as redis,
            CachingWorker(redis, key_prefix, "a") as first,
            CachingWorker(redis, key_prefix, "b") as second,
            CachingWorker(redis, key_prefix, "c") as third,
            feeding(redis, key_prefix, first, second, third) as rig,
        ):
            rig.feed._clock = asyncio.get_running_loop().time
            for _ in range(150):
                await act(server, rig, rnd.choice(rig.workers))
            for worker in rig.workers:
                worker.failures = 0
            rig.announce(*rig.workers)
            await rig.until(rig.is_true)

    with EmbeddedRedis() as server:
        asyncio.run(main(server))
