import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil
import pytest
from redis.asyncio import Redis

from baton.cluster.lease import Lease, Repeater
from baton.cluster.membership import WORKER, Membership, MembershipWatch
from baton.cluster.records import Keys
from baton.cluster.redis_client import connect_redis, redis_client, without_password
from baton.cluster.redis_server import EmbeddedRedis
from baton.cluster.worker_info import Load, State, WorkerInfo
from baton.errors import ClusterError, SettingsError
from baton.ids import WorkerId

FAST = Lease(heartbeat_s=0.05, expiry_s=1.5, poll_s=0.02, retry_max_s=0.05)
PATIENCE_S = 60.0


def worker(name: str = "decode-0", state: State = "ready", running: int = 0, epoch: str = "1") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        role="decode",
        state=state,
        address="127.0.0.1:1",
        model="m",
        fingerprint="f",
        context_length=1,
        vocabulary_size=1,
        block_tokens=1,
        kv_dtype="float32",
        kv_blocks_total=1,
        epoch=epoch,
        load=Load(running_sequences=running),
    )


@dataclass
class Described:
    """A worker whose record a test can change."""

    info: WorkerInfo = field(default_factory=worker)

    def __call__(self) -> WorkerInfo:
        return self.info


@asynccontextmanager
async def client_for(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = redis_client(server.url)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def watching(redis: Redis, prefix: str) -> AsyncIterator[MembershipWatch]:
    watch = MembershipWatch(redis, prefix, FAST)
    await watch.start()
    try:
        yield watch
    finally:
        await watch.close()


async def until(watch: MembershipWatch, holds: Callable[[tuple[WorkerInfo, ...]], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds(tuple(watch.workers())):
            await watch.changed()


async def until_stale(watch: MembershipWatch) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not watch.is_stale:  # noqa: ASYNC110 - nobody but tests waits for it, so there is no event
            await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


# ---- decisions


def test_while_holding_a_missing_worker_stays() -> None:
    known, announced = [worker("a"), worker("b")], [worker("b", running=3), worker("c")]
    assert WORKER.merge(known, announced, is_holding=True) == (worker("a"), worker("b", running=3), worker("c"))


def test_otherwise_only_who_is_announced_is_there() -> None:
    assert WORKER.merge([worker("a")], [worker("c"), worker("b")], is_holding=False) == (worker("b"), worker("c"))


def test_a_record_of_some_other_version_is_left_out() -> None:
    assert WORKER.parse(["{}", "junk", worker("a").model_dump_json()]) == [worker("a")]


def test_an_unknown_field_does_no_harm() -> None:
    record = worker("a").model_dump_json()[:-1] + ',"news":1}'
    assert WORKER.parse([record]) == [worker("a")]


def test_the_retry_delay_doubles_up_to_its_bound() -> None:
    delays = [Lease().retry_delay_s(failures, jitter=1.0) for failures in (1, 2, 3, 4, 5, 1000)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert Lease().retry_delay_s(1000, jitter=0.0) == 0.5


def test_keys_are_hash_tagged() -> None:
    keys = Keys("p", "worker")
    assert keys.ids == "{p}:workers" and keys.record("w") == "{p}:worker:w"


def test_a_password_is_stripped_from_a_url() -> None:
    assert without_password("redis://me:secret@host:1/0") == "redis://***@host:1/0"
    assert without_password("redis://host:1/0") == "redis://host:1/0"


# ---- with a real Redis


def test_a_worker_is_seen_changes_and_leaves(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis, watching(redis, key_prefix) as watch:
            assert watch.workers() == ()
            described = Described()
            membership = Membership(redis, key_prefix, described, FAST)
            await membership.start()
            await until(watch, lambda seen: seen == (worker(),))
            described.info = worker(running=7)  # the next heartbeat tells
            await until(watch, lambda seen: seen == (worker(running=7),))
            described.info = worker(state="draining")
            await membership.announce()
            await until(watch, lambda seen: [one.state for one in seen] == ["draining"])
            await membership.close()
            await membership.close()
            await until(watch, lambda seen: seen == ())
            assert await redis.keys(f"{{{key_prefix}}}*") == [Keys(key_prefix, "worker").since]

    run(test)


def test_redis_back_empty_between_two_reads_loses_no_worker(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis, watching(redis, key_prefix) as watch:
            membership = Membership(redis, key_prefix, worker, FAST)
            await membership.start()
            await until(watch, lambda seen: len(seen) == 1)
            sizes = []
            for _ in range(5):
                keys = Keys(key_prefix, "worker")
                await redis.delete(keys.ids, keys.since, keys.record("decode-0"))
                await watch._poll()
                sizes.append(len(watch.workers()))
            assert sizes == [1] * 5
            await membership.close()
            await until(watch, lambda seen: seen == ())

    run(test)


def test_a_worker_that_died_is_gone_with_its_lease(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis, watching(redis, key_prefix) as watch:
            # its one heartbeat: then the process was killed
            await redis.sadd(Keys(key_prefix, "worker").ids, "decode-0")  # type: ignore[misc]
            await redis.set(Keys(key_prefix, "worker").record("decode-0"), worker().model_dump_json(), px=1000)
            await until(watch, lambda seen: len(seen) == 1)
            await until(watch, lambda seen: seen == ())
            assert await redis.smembers(Keys(key_prefix, "worker").ids) == set()  # type: ignore[misc]

    run(test)


def test_heartbeats_outlive_the_lease(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis:
            beats = 0
            enough = asyncio.Event()

            def describe() -> WorkerInfo:
                nonlocal beats
                beats += 1
                if beats * FAST.heartbeat_s > 2 * FAST.expiry_s:
                    enough.set()
                return worker(running=beats)

            membership = Membership(redis, key_prefix, describe, FAST)
            await membership.start()
            async with watching(redis, key_prefix) as watch, asyncio.timeout(PATIENCE_S):
                await enough.wait()
                assert len(watch.workers()) == 1
            await membership.close()

    run(test)


def test_a_worker_does_not_take_back_its_successors_record(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with client_for(redis_server) as redis, watching(redis, key_prefix) as watch:
            before = Membership(redis, key_prefix, Described(worker(epoch="1")), Lease())
            after = Membership(redis, key_prefix, Described(worker(epoch="2")), Lease())
            await before.start()
            await after.start()
            await before.close()
            await until(watch, lambda seen: [one.epoch for one in seen] == ["2"])
            await after.close()

    run(test)


def test_redis_killed_and_back_empty_loses_no_worker(key_prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: EmbeddedRedis) -> None:
        async with client_for(server) as redis, client_for(server) as other, watching(other, key_prefix) as watch:
            described = Described()
            membership = Membership(redis, key_prefix, described, FAST)
            await membership.start()
            await until(watch, lambda seen: len(seen) == 1)
            seen_empty = asyncio.create_task(until(watch, lambda seen: seen == ()))
            os.kill(server.pid, signal.SIGKILL)
            await until_stale(watch)
            assert watch.workers() == (worker(),)
            described.info = worker(running=5)
            await membership.announce()  # nobody hears it, and nothing breaks
            psutil.Process(server.pid).wait(PATIENCE_S)
            server.start()
            await until(watch, lambda seen: seen == (worker(running=5),))
            assert not watch.is_stale and not seen_empty.done()
            await membership.close()
            await seen_empty

    with EmbeddedRedis() as server:
        run(lambda: test(server))
    lines = [line for line in caplog.messages if "Reading the list of workers" in line and "fails" in line]
    assert len(lines) == 1


def test_a_worker_that_vanished_while_redis_was_away_is_held_for_one_lease_only(key_prefix: str) -> None:
    async def test(server: EmbeddedRedis) -> None:
        async with client_for(server) as redis, watching(redis, key_prefix) as watch:
            membership = Membership(redis, key_prefix, Described(), FAST)
            await membership.start()
            await until(watch, lambda seen: len(seen) == 1)
            os.kill(server.pid, signal.SIGKILL)
            await until_stale(watch)
            await membership.close()
            psutil.Process(server.pid).wait(PATIENCE_S)
            server.start()
            await until(watch, lambda seen: seen == ())

    with EmbeddedRedis() as server:
        run(lambda: test(server))


def test_a_loop_goes_on_after_any_failure() -> None:
    async def test() -> None:
        calls, twice = [], asyncio.Event()

        async def act() -> None:
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError
            twice.set()

        repeater = Repeater(act, 0.0, FAST, "Acting")
        repeater.start()
        async with asyncio.timeout(PATIENCE_S):
            await twice.wait()
        await asyncio.sleep(0)
        assert not repeater.is_failing
        await repeater.close()
        await repeater.close()

    run(test)


def test_close_ends_a_loop_even_if_its_cancellation_is_swallowed() -> None:
    async def test() -> None:
        begun = asyncio.Event()

        async def act() -> None:
            begun.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

        repeater = Repeater(act, 0.0, FAST, "Acting")
        repeater.start()
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
            await repeater.close()

    run(test)


# ---- connecting


def test_a_redis_that_answers_is_connected(redis_server: EmbeddedRedis) -> None:
    async def test() -> None:
        client = await connect_redis(redis_server.url)
        assert await client.ping()
        await client.aclose()

    run(test)


@pytest.mark.parametrize(
    ("url", "kind", "says"),
    [
        ("redis://me:secret@127.0.0.1:1/0", ClusterError, "Connection|Connect call"),
        ("redis://nobody.invalid:6379/0", ClusterError, "nobody.invalid"),
        ("http://127.0.0.1/", SettingsError, "not a Redis URL"),
        ("redis://127.0.0.1:port/0", SettingsError, "not a Redis URL"),
    ],
)
def test_an_unusable_url_is_told_in_a_sentence(url: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        asyncio.run(connect_redis(url))
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_told_and_not_shown(redis_server: EmbeddedRedis) -> None:
    url = f"redis://:wrong-secret@{redis_server.url.split('@')[1]}"
    with pytest.raises(ClusterError, match="user name or password") as caught:
        asyncio.run(connect_redis(url))
    assert "wrong-secret" not in str(caught.value)


def test_somebody_who_is_no_redis_is_found_out() -> None:
    async def test() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ClusterError, match="not Redis"):
                await connect_redis(f"redis://127.0.0.1:{port}/0")

    run(test)


def test_somebody_who_never_answers_is_given_up() -> None:
    async def test() -> None:
        done = asyncio.Event()

        async def listen(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await done.wait()
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ClusterError, match="did not answer within 1 s"):
                await connect_redis(f"redis://127.0.0.1:{port}/0")
            done.set()

    run(test)
