"""Workers' directories over a real Redis that is killed, and workers that are."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from baton.cluster import cache_ledger
from baton.cluster.cache_events import CacheChanges, unpack
from baton.cluster.cache_publisher import CacheEventPublisher
from baton.cluster.lease import Lease
from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS, Tier
from kvcache.directory import directory as directory_module
from kvcache.directory.calls import Holder
from kvcache.directory.directory import ASKED_NAMES_MAX, Directory
from tests.kvcache.directory.directory_redis import block, blocks

FAST = Lease(heartbeat_s=0.1, retry_max_s=0.1)
PATIENCE_S = 60.0
A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


@pytest.fixture
def answers_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look-up and pin must be answered, on however busy a machine."""
    monkeypatch.setattr(directory_module, "ANSWER_TIMEOUT_S", PATIENCE_S)


PATIENTLY = pytest.mark.usefixtures("answers_that_take_their_time")


class CachingProcess:
    """A worker that is only its cache."""

    def __init__(self, redis: Redis, prefix: str, worker: WorkerId, epoch: str = "1", lease: Lease = FAST) -> None:
        self.worker = worker
        self.publisher = CacheEventPublisher(redis, prefix, worker, epoch, lease)
        self.directory = Directory(redis, prefix, worker, epoch, lambda: self.publisher.inventory().blocks, lease)
        self.publisher.join(self.directory)
        self.pins: list[tuple[list[BlockHash], float]] = []
        self.copies: dict[BlockHash, int] = {}
        self.directory.on_pins = lambda names, until_s: self.pins.append((list(names), until_s))
        self.directory.on_copies = self.copies.update

    def store(self, *names: BlockHash, tier: Tier = "hbm") -> None:
        self.publisher.record(CacheChanges({tier: names}))

    def remove(self, *names: BlockHash) -> None:
        self.publisher.record(CacheChanges(removed=names))

    @property
    def held(self) -> Iterator[tuple[BlockHash, Holder]]:
        for tier, names in self.publisher.inventory().blocks.items():
            for name in unpack(names):
                yield name, Holder(self.worker, tier)

    async def start(self) -> None:
        await self.directory.start()
        await self.publisher.start()

    async def close(self) -> None:
        await self.publisher.close()
        await self.directory.close()
        await self.directory.close()


@asynccontextmanager
async def cluster(server: EmbeddedRedis, prefix: str, *workers: WorkerId) -> AsyncIterator[list[CachingProcess]]:
    async with AsyncExitStack() as stack:
        made = []
        for worker in workers:
            redis = redis_client(server.url)
            stack.push_async_callback(redis.aclose)
            process = CachingProcess(redis, prefix, worker)
            await process.start()
            stack.push_async_callback(process.close)
            made.append(process)
        yield made


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - of several processes' state, Redis's among them
            await asyncio.sleep(0.01)


async def named(directory: Directory, names: list[BlockHash], expected: list[set[Holder]]) -> None:
    """Returns as soon as these are what the directory says."""
    found: list[set[Holder]] = []
    async with asyncio.timeout(PATIENCE_S):
        while found != expected:
            found = [set(of_name) for of_name in await directory.holders(names)]
            await asyncio.sleep(0.01)


def kill(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGKILL)
    psutil.Process(server.pid).wait(PATIENCE_S)


@PATIENTLY
def test_workers_see_what_the_others_hold(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with cluster(redis_server, key_prefix, A, B, C) as (a, b, c):
            one, two, three = blocks(1, 2, 3)
            a.store(one, two)
            b.store(two, tier="ddr")
            await named(
                c.directory, [one, two, three], [{Holder(A, "hbm")}, {Holder(A, "hbm"), Holder(B, "ddr")}, set()]
            )
            assert await c.directory.copies([one, two, three]) == [1, 2, 0]
            assert await b.directory.copies([one, two, three]) == [1, 1, 0]
            c.store(two, three)
            await until(lambda: c.copies == {two: 2, three: 0})
            a.publisher.record(CacheChanges(moved={"ssd": (one,)}, removed=(two,)))
            await named(c.directory, [one, two], [{Holder(A, "ssd")}, {Holder(B, "ddr"), Holder(C, "hbm")}])
            await a.close()
            await named(c.directory, [one], [set()])

    asyncio.run(main())


@PATIENTLY
def test_a_look_up_may_ask_for_many(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with cluster(redis_server, key_prefix, A, B) as (a, b):
            many = blocks(*range(ASKED_NAMES_MAX))
            a.store(*many)
            await until(lambda: not a.directory.has_news)
            await named(b.directory, [many[-1]], [{Holder(A, "hbm")}])
            assert await b.directory.copies(many) == [1] * ASKED_NAMES_MAX
            assert await b.directory.copies([]) == [] == await b.directory.pin([], A, 1.0)
            assert await b.directory.pin(many, A, 1.0) == ["hbm"] * ASKED_NAMES_MAX
            with pytest.raises(AssertionError):
                await b.directory.copies([*many, block(-1)])

    asyncio.run(main())


@PATIENTLY
def test_a_holder_learns_of_a_pin_with_its_heartbeat(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with cluster(redis_server, key_prefix, A, B) as (a, b):
            one, two = blocks(1, 2)
            a.store(one, tier="ssd")
            await named(b.directory, [one], [{Holder(A, "ssd")}])
            now_s = asyncio.get_running_loop().time()
            assert await b.directory.pin([one, two], A, 30.0) == ["ssd", None]
            assert await b.directory.pin([one], C, 30.0) == [None]
            await until(lambda: a.pins)
            ((names, until_s),) = a.pins
            assert names == [one] and now_s + 29 < until_s < now_s + 30 + PATIENCE_S

    asyncio.run(main())


def test_without_redis_nothing_raises_and_nothing_is_found(key_prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main(server: EmbeddedRedis) -> None:
        redis = redis_client(server.url)
        worker = CachingProcess(redis, key_prefix, A)
        kill(server)
        await worker.start()
        worker.store(block(1))
        for _ in range(3):
            assert await worker.directory.holders([block(1)]) == [] == await worker.directory.copies([block(1)])
            assert await worker.directory.pin([block(1)], B, 1.0) == []
        server.start()
        await named(worker.directory, [block(1)], [{Holder(A, "hbm")}])
        kill(server)
        await worker.close()
        await redis.aclose()

    with EmbeddedRedis() as server:
        asyncio.run(main(server))
    assert len([line for line in caplog.messages if "does not answer" in line]) == 1


def test_events_and_directory_take_one_round_trip(
    redis_server: EmbeddedRedis, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        sent: list[int] = []
        execute = Pipeline.execute

        async def counting(self: Pipeline, raise_on_error: bool = True) -> list[Any]:
            sent.append(len(self))
            return await execute(self, raise_on_error)

        monkeypatch.setattr(Pipeline, "execute", counting)
        redis = redis_client(redis_server.url)
        worker = CachingProcess(redis, key_prefix, A, lease=Lease(heartbeat_s=60, expiry_s=60))
        await worker.start()
        assert sent == [1], "the registration"
        for number in range(3):
            worker.store(block(number))
            await until(lambda number=number: block(number) in worker.copies)
        assert sent == [1, 3, 3, 3], "a batch of events, its expiry, and a sync"
        await worker.close()
        await redis.aclose()

    asyncio.run(main())


@PATIENTLY
def test_a_redis_that_forgets_its_scripts_is_told_them_again(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with cluster(redis_server, key_prefix, A, B) as (a, b):
            redis = redis_client(redis_server.url)
            for number in range(3):
                registered = a.directory.registered
                await redis.script_flush()
                a.store(block(number))
                await named(b.directory, [block(number)], [{Holder(A, "hbm")}])
                await redis.script_flush()
                assert await b.directory.pin([block(number)], A, 1.0) == ["hbm"]
                assert a.directory.registered == registered, "nothing was lost"
            await redis.aclose()

    asyncio.run(main())


def test_what_was_dropped_is_told_with_the_inventory(
    redis_server: EmbeddedRedis, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_ledger, "PENDING_BLOCKS_MAX", 50)

    async def main() -> None:
        async with cluster(redis_server, key_prefix, A) as (worker,):
            before, names = worker.directory.registered, list(blocks(*range(120)))
            for name in names:
                worker.store(name)
            assert worker.publisher.dropped == 2
            await named(worker.directory, names, [{Holder(A, "hbm")}] * 120)
            assert worker.directory.registered != before

    asyncio.run(main())


def test_redis_killed_under_load_is_filled_again_block_by_block(key_prefix: str) -> None:
    blocks_each, changes = 34_000, random.Random(5)

    async def load(workers: list[CachingProcess]) -> None:
        at = 0
        while True:
            for worker in workers:
                at += 1
                worker.store(block(1_000_000 + at), block(changes.randrange(100_000)), tier=changes.choice(TIERS))
                worker.remove(block(changes.randrange(100_000)))
            await asyncio.sleep(0.002)

    async def main(server: EmbeddedRedis) -> None:
        async with cluster(server, key_prefix, A, B, C) as workers:
            for number, worker in enumerate(workers):
                first = number * blocks_each
                worker.store(*blocks(*range(first, first + blocks_each)), tier=TIERS[number])
            loading = asyncio.create_task(load(workers))
            await until(lambda: all(worker.directory.is_complete for worker in workers))
            kill(server)
            await asyncio.sleep(0.3)  # the load goes on
            server.start()
            start_s = asyncio.get_running_loop().time()
            before = {worker.worker: worker.directory.registered for worker in workers}
            await until(
                lambda: all(worker.directory.registered not in (None, before[worker.worker]) for worker in workers)
            )
            await until(lambda: all(worker.directory.is_complete for worker in workers))
            took_s = asyncio.get_running_loop().time() - start_s
            loading.cancel()
            await until(lambda: not any(worker.publisher.has_news for worker in workers))
            expected: dict[BlockHash, set[Holder]] = {}
            for worker in workers:
                for name, holder in worker.held:
                    expected.setdefault(name, set()).add(holder)
            assert len(expected) > 95_000 and took_s < 10
            names = [*expected, *(block(-number) for number in range(1000))]
            for at in range(0, len(names), ASKED_NAMES_MAX):
                asked = names[at : at + ASKED_NAMES_MAX]
                await named(workers[0].directory, asked, [expected.get(name, set()) for name in asked])

    with EmbeddedRedis() as server:
        asyncio.run(main(server))


# ---- kill -9 of a worker

DYING_WORKERS = """
import os, signal, socket, sys
from random import Random
from redis.connection import Connection
from baton.clock import monotonic
from baton.cluster.cache_events import CacheChanges, CacheEvents
from baton.cluster.lease import Lease
from kvcache.directory.calls import Scope
from kvcache.directory.reporter import Reporter
from tests.kvcache.directory.directory_redis import blocks

def die_after(size_bytes, worker, port, password):
    connection = Connection(port=port, password=password)
    connection.connect()
    inventory = {"ssd": b"".join(blocks(*range(600)))}
    reporter = Reporter(Scope(sys.argv[1]), worker, "1", lambda: inventory, Lease(expiry_s=0.5), monotonic, lambda: "t")
    sent, number = 0, 0
    while True:
        for call in reporter.begin(True):
            packed = b"".join(connection.pack_command("EVAL", call.script.source, 1, call.key, *call.arguments))
            if sent + len(packed) > size_bytes:
                connection._sock.sendall(packed[: size_bytes - sent])
                os.kill(os.getpid(), signal.SIGKILL)
            connection._sock.sendall(packed)
            sent += len(packed)
            reporter.finish([connection.read_response(disable_decoding=True)])
        number += 1
        reporter.told(CacheEvents.of("1", number, CacheChanges({"hbm": blocks(number)}, removed=blocks(number - 1))))

for place, size_bytes in enumerate(map(int, sys.argv[4:])):
    child = os.fork()
    if not child:
        die_after(size_bytes, f"w{place}", int(sys.argv[2]), sys.argv[3])
    os.waitpid(child, 0)
"""
KILLS = 40


def test_a_worker_killed_anywhere_in_an_update_is_gone_with_its_lease(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    draw = random.Random(11)
    places = [str(draw.randrange(1, 80_000)) for _ in range(KILLS)]
    url = redis_server.url.removeprefix("redis://:").removesuffix("/0")
    password, _, port = url.replace("@127.0.0.1:", " ").partition(" ")
    command = [sys.executable, "-c", DYING_WORKERS, key_prefix, port, password, *places]

    async def main() -> None:
        redis = redis_client(redis_server.url)
        survivor = CachingProcess(redis, key_prefix, A)
        await survivor.start()
        dying = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        seen = set[WorkerId]()
        names = list(blocks(*range(600)))
        while dying.returncode is None:
            found = await survivor.directory.holders(names)
            seen |= {holder.worker_id for of_name in found for holder in of_name}
            await asyncio.sleep(0.002)
        async with asyncio.timeout(0.5 + 4.0):  # its own lease, not the usual one, and some look-ups
            await named(survivor.directory, names, [set()] * len(names))
        assert dying.returncode == 0 and len(seen) > KILLS / 4
        await survivor.close()
        await redis.aclose()

    asyncio.run(main())
