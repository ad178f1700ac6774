"""Publisher and reader over a real Redis."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256

import psutil
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from baton.cluster import cache_ledger
from baton.cluster.cache_events import CacheChanges, CacheEvents, stream_key, unpack
from baton.cluster.cache_publisher import STREAM_BATCHES_MAX, STREAM_EXPIRY_S, CacheEventPublisher
from baton.cluster.cache_reader import CacheEventReader
from baton.cluster.lease import Lease
from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId

FAST = Lease(retry_max_s=0.05)
PATIENCE_S = 60.0
A, B = WorkerId("a"), WorkerId("b")


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(sha256(str(number).encode()).digest()[:16]) for number in numbers)


def storing(*numbers: int) -> CacheChanges:
    return CacheChanges({"hbm": names(*numbers)})


@asynccontextmanager
async def client_for(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = redis_client(server.url)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def publishing(
    redis: Redis, prefix: str, worker: WorkerId, epoch: str = "1"
) -> AsyncIterator[CacheEventPublisher]:
    publisher = CacheEventPublisher(redis, prefix, worker, epoch, FAST)
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close()
        await publisher.close()


async def read_until(
    reader: CacheEventReader, holds: Callable[[list[tuple[WorkerId, CacheEvents]]], bool]
) -> list[tuple[WorkerId, CacheEvents]]:
    """What was read once it is enough; goes on while Redis is away."""
    found: list[tuple[WorkerId, CacheEvents]] = []
    async with asyncio.timeout(PATIENCE_S):
        while not holds(found):
            found += await reader.read(0.1)
    return found


async def resumed(reader: CacheEventReader) -> set[WorkerId]:
    """Each of the client's connections notices for itself that Redis was away."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(RedisError, OSError):
                return await reader.resume()


def kill(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGKILL)
    psutil.Process(server.pid).wait(PATIENCE_S)


def blocks_of(published: list[tuple[WorkerId, CacheEvents]], worker: WorkerId) -> list[BlockHash]:
    return [name for who, events in published if who == worker for name in unpack(events.stored.get("hbm", b""))]


def test_what_workers_publish_is_read_in_order(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            redis = await stack.enter_async_context(client_for(redis_server))
            first = await stack.enter_async_context(publishing(redis, key_prefix, A))
            second = await stack.enter_async_context(publishing(redis, key_prefix, B, "2"))
            reader = CacheEventReader(redis, key_prefix)
            await reader.follow([A, B])
            first.record(storing(1))
            second.record(storing(2))
            published = await read_until(reader, lambda found: len(found) == 2)
            assert {(who, events.epoch, events.sequence) for who, events in published} == {(A, "1", 1), (B, "2", 1)}
            first.record(storing(3))
            first.record(CacheChanges())
            first.record(CacheChanges(removed=names(1)))
            published = await read_until(reader, lambda found: len(found) == 1)
            assert published == [(A, CacheEvents.of("1", 2, CacheChanges({"hbm": names(3)}, removed=names(1))))]
            assert first.sequence == 2 and await reader.read(0.001) == []

    asyncio.run(main())


def test_a_new_reader_starts_with_what_comes_next(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis, publishing(redis, key_prefix, A) as publisher:
            early = CacheEventReader(redis, key_prefix)
            await early.follow([A])
            publisher.record(storing(1))
            await read_until(early, lambda found: len(found) == 1)
            late = CacheEventReader(redis, key_prefix)
            await late.follow([A, B])
            await late.follow([A])
            publisher.record(storing(2))
            published = await read_until(late, lambda found: len(found) >= 1)
            assert [events.sequence for _, events in published] == [2]
            late.unfollow(B)
            late.unfollow(B)
            assert await early.resume() == set()

    asyncio.run(main())


def test_a_stream_that_began_anew_is_read_from_its_start(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    """Even where the clock of the new Redis is behind that of the old."""

    async def main() -> None:
        async with client_for(redis_server) as redis:
            reader, key = CacheEventReader(redis, key_prefix), stream_key(key_prefix, A)
            await redis.xadd(key, {b"e": CacheEvents("1", 1).to_bytes()}, id="9-9")
            await reader.follow([A])
            await redis.delete(key)
            await redis.xadd(key, {b"e": CacheEvents("1", 2).to_bytes()}, id="8-8")
            assert await reader.read(0.001) == []
            assert await reader.resume() == {A}
            assert [events.sequence for _, events in await reader.read()] == [2]
            assert await reader.resume() == set()
            await redis.delete(key)

    asyncio.run(main())


def test_a_worker_may_leave_while_redis_is_asked_for_its_stream(
    redis_server: EmbeddedRedis, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis:
            reader, key = CacheEventReader(redis, key_prefix), stream_key(key_prefix, A)
            await redis.xadd(key, {b"e": CacheEvents("1", 1).to_bytes()})
            await reader.follow([A, B])
            await redis.delete(key)
            ask = reader._last_entries

            async def leaving(worker_ids: Iterable[WorkerId]) -> dict[WorkerId, bytes]:
                reader.unfollow(A)
                return await ask(worker_ids)

            monkeypatch.setattr(reader, "_last_entries", leaving)
            assert await reader.resume() == set()
            assert reader._positions.keys() == {B}

    asyncio.run(main())


def test_a_stream_is_bounded_and_goes_with_its_worker(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis, publishing(redis, key_prefix, A) as publisher:
            reader, key = CacheEventReader(redis, key_prefix), stream_key(key_prefix, A)
            await reader.follow([A])
            for number in range(3 * STREAM_BATCHES_MAX):
                await redis.xadd(key, {b"e": CacheEvents("0", number).to_bytes()})
            publisher.record(storing(1))
            await read_until(reader, lambda found: any(events.epoch == "1" for _, events in found))
            assert STREAM_BATCHES_MAX <= await redis.xlen(key) < 1.2 * STREAM_BATCHES_MAX
            assert 0 < await redis.pttl(key) <= STREAM_EXPIRY_S * 1000

    asyncio.run(main())


def test_what_is_no_batch_is_skipped_and_counted(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with client_for(redis_server) as redis:
            reader, key = CacheEventReader(redis, key_prefix), stream_key(key_prefix, A)
            await reader.follow([A])
            await redis.xadd(key, {b"e": b"\xff junk"})
            await redis.xadd(key, {b"other": b"field"})
            await redis.xadd(key, {b"e": CacheEvents.of("1", 3, storing(1)).to_bytes()})
            published = await read_until(reader, lambda found: len(found) == 1)
            assert published[0][1].sequence == 3 and reader.malformed == 2
            await redis.delete(key)

    asyncio.run(main())


def test_redis_killed_and_back_empty_loses_no_change_that_was_not_read(
    key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(server: EmbeddedRedis) -> None:
        async with client_for(server) as redis, publishing(redis, key_prefix, A) as publisher:
            reader = CacheEventReader(redis, key_prefix)
            await reader.follow([A])
            publisher.record(storing(1))
            await read_until(reader, lambda found: len(found) == 1)
            kill(server)
            for number in range(2, 6):
                publisher.record(storing(number))
                await asyncio.sleep(0)
            with pytest.raises((RedisError, OSError)):
                await reader.read(0.001)
            server.start()
            assert await resumed(reader) == {A}, "the stream is not what it was"
            published = await read_until(reader, lambda found: len(blocks_of(found, A)) >= 4)
            assert sorted(blocks_of(published, A)) == sorted(names(2, 3, 4, 5))
            assert published[0].events.sequence <= 2, "nothing is missing"
            assert publisher.dropped == 0

    with EmbeddedRedis() as server:
        asyncio.run(main(server))
    told = [line for line in caplog.messages if "Publishing KV events" in line]
    again = sum("works again" in line for line in told)
    assert sum("fails" in line for line in told) <= again + 1, "one line for as long as it fails"


def test_while_redis_is_away_what_waits_is_bounded(key_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_ledger, "PENDING_BLOCKS_MAX", 50)

    async def main(server: EmbeddedRedis) -> None:
        async with client_for(server) as redis, publishing(redis, key_prefix, A) as publisher:
            reader = CacheEventReader(redis, key_prefix)
            await reader.follow([A])
            kill(server)
            for number in range(120):
                publisher.record(storing(number))
            assert publisher.dropped == 2 and len(publisher.inventory().blocks["hbm"]) == 120 * 16
            server.start()
            await resumed(reader)
            published = await read_until(reader, lambda found: bool(found))
            assert published[0][1].sequence == 3, "two numbers were skipped, so that readers know"
            assert len(blocks_of(published, A)) == 120 - 2 * 51

    with EmbeddedRedis() as server:
        asyncio.run(main(server))


def test_a_write_that_failed_is_done_again_under_the_same_numbers(
    redis_server: EmbeddedRedis, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost after the write was done: readers see the batch twice, and know it by its number."""

    async def main() -> None:
        async with client_for(redis_server) as redis:
            execute, failures = Pipeline.execute, [ConnectionError("lost"), ConnectionError("lost")]

            async def losing(self: Pipeline, *args: object, **options: object) -> object:
                answer = await execute(self, *args, **options)  # type: ignore[arg-type]
                if failures and len(answer) == 2:  # a batch and its expiry
                    raise failures.pop()
                return answer

            monkeypatch.setattr(Pipeline, "execute", losing)
            reader = CacheEventReader(redis, key_prefix)
            async with publishing(redis, key_prefix, A) as publisher:
                await redis.delete(stream_key(key_prefix, A))
                reader._positions[A] = b"0-0"
                publisher.record(storing(1))
                published = await read_until(reader, lambda found: len(found) == 3)
                assert {(events.sequence, events.stored["hbm"]) for _, events in published} == {(1, names(1)[0])}

    asyncio.run(main())
