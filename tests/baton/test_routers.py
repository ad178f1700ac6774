import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import psutil
from redis.asyncio import Redis

from baton.clock import ManualClock
from baton.cluster.lease import Lease
from baton.cluster.records import Keys
from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.cluster.router_info import PlacedLoad, RouterInfo
from baton.cluster.routers import LOAD_EXPIRY_S, RouterAnnouncement, RouterWatch
from baton.ids import WorkerId

FAST = Lease(heartbeat_s=0.02, expiry_s=1.5, poll_s=0.02, retry_max_s=0.05)
PATIENCE_S = 60.0


class Described:
    """A router whose load a test can change."""

    def __init__(self, name: str, sequences: int = 1) -> None:
        self.name, self.sequences = name, sequences

    @property
    def placed(self) -> dict[WorkerId, PlacedLoad]:
        return {WorkerId("decode-0"): PlacedLoad(sequences=self.sequences)}

    def __call__(self) -> RouterInfo:
        return RouterInfo(
            router_id=self.name, grpc_address="127.0.0.1:1", http_address="127.0.0.1:2", placed=self.placed
        )


@asynccontextmanager
async def client_for(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = redis_client(server.url)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def announced(redis: Redis, prefix: str, described: Described) -> AsyncIterator[RouterAnnouncement]:
    announcement = RouterAnnouncement(redis, prefix, described, FAST)
    await announcement.start()
    try:
        yield announcement
    finally:
        await announcement.close()


@asynccontextmanager
async def watching(redis: Redis, prefix: str, own_id: str, **options: ManualClock) -> AsyncIterator[RouterWatch]:
    watch = RouterWatch(redis, prefix, own_id, FAST, **options)
    await watch.start()
    try:
        yield watch
    finally:
        await watch.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - what is waited for is Redis, which tells nobody
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


def test_routers_see_each_others_load_and_not_their_own(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        a, b = Described("a"), Described("b", sequences=2)
        async with (
            client_for(redis_server) as redis,
            announced(redis, key_prefix, a),
            announced(redis, key_prefix, b),
            watching(redis, key_prefix, "a") as watch,
        ):
            assert [router.router_id for router in watch.peers()] == ["b"]
            assert watch.placed() == {"b": b.placed}
            b.sequences = 7  # the next heartbeat tells
            await until(lambda: watch.placed() == {"b": b.placed})

    run(test)


def test_a_router_that_leaves_takes_its_load_along(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis, watching(redis, key_prefix, "a") as watch:
            async with announced(redis, key_prefix, Described("b")):
                await until(lambda: bool(watch.placed()))
            await until(lambda: not watch.placed() and not watch.peers())
            assert await redis.keys(f"{{{key_prefix}}}*") == [Keys(key_prefix, "router").since]

    run(test)


def test_without_redis_the_peers_stay_known_and_their_load_expires(key_prefix: str) -> None:
    async def test(server: EmbeddedRedis) -> None:
        clock, b = ManualClock(), Described("b")
        async with (
            client_for(server) as redis,
            announced(redis, key_prefix, b),
            watching(redis, key_prefix, "a", clock=clock) as watch,
        ):
            os.kill(server.pid, signal.SIGKILL)
            await until(lambda: watch.is_stale)
            clock.advance(LOAD_EXPIRY_S)
            assert watch.placed() == {"b": b.placed}
            clock.advance(0.1)
            assert watch.placed() == {}
            assert [router.router_id for router in watch.peers()] == ["b"], "who may still know a decision"
            psutil.Process(server.pid).wait(PATIENCE_S)
            b.sequences = 5
            server.start()
            await until(lambda: watch.placed() == {"b": b.placed})
            assert not watch.is_stale

    with EmbeddedRedis() as server:
        run(lambda: test(server))


def test_workers_and_routers_keep_apart(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis, announced(redis, key_prefix, Described("b")):
            keys = sorted(await redis.keys(f"{{{key_prefix}}}*"))
            assert keys == [f"{{{key_prefix}}}:router:b", f"{{{key_prefix}}}:routers"]

    run(test)
