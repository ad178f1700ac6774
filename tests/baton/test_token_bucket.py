import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from baton.clock import Clock, ManualClock, monotonic
from baton.cluster import token_bucket
from baton.cluster.lease import Lease
from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.cluster.token_bucket import TAKE, UNITS, Bucket, Rate, TokenBuckets

FAST = Lease(heartbeat_s=0.05, expiry_s=0.4, poll_s=0.02, retry_max_s=0.05)
PATIENCE_S = 60.0
HOUR = Rate(60_000, 1_000)
"""A token a millisecond, and a second's worth at once."""


@pytest.fixture(autouse=True)
def answers_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that is there must be heard, on however busy a machine."""
    monkeypatch.setattr(token_bucket, "TAKE_TIMEOUT_S", PATIENCE_S)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@asynccontextmanager
async def buckets_at(
    server: EmbeddedRedis, prefix: str, clock: Clock = monotonic, routers: int = 1
) -> AsyncIterator[tuple[TokenBuckets, list[bool]]]:
    told: list[bool] = []
    async with client_of(server) as client:
        buckets = TokenBuckets(client, prefix, lambda: routers, told.append, clock, FAST, settle_s=0.02)
        try:
            yield buckets, told
        finally:
            await buckets.close()


@asynccontextmanager
async def client_of(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = redis_client(server.url)
    try:
        yield client
    finally:
        await client.aclose()


# ---- one bucket, on a clock of our own


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket, rate = Bucket(HOUR.burst, 0), HOUR
    assert bucket.missing_ms(1000, rate) == 0
    bucket = bucket.less(1000)
    assert bucket.missing_ms(10, rate) == 10
    assert bucket.at(9, rate).missing_ms(10, rate) == 1
    assert bucket.at(10, rate).missing_ms(10, rate) == 0
    assert bucket.at(5000, rate).level == rate.burst


def test_more_than_a_burst_may_be_taken_from_a_full_bucket_only() -> None:
    bucket = Bucket(HOUR.burst, 0)
    assert bucket.missing_ms(5000, HOUR) == 0
    assert bucket.less(1).missing_ms(5000, HOUR) == 1
    assert bucket.less(5000).missing_ms(1, HOUR) == 4001, "the debt is paid first"


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    assert Bucket(5, 100).at(50, HOUR).level == 5


def test_a_share_is_never_nothing() -> None:
    assert Rate(10, 3).share(4) == Rate(2, 1)


@given(
    st.integers(1, 10**9),
    st.integers(1, 10**9),
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 10**7)), max_size=30),
)
def test_what_is_taken_never_exceeds_the_rate_and_one_burst(
    per_minute: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    rate, now_ms, taken = Rate(per_minute, burst), 0, 0
    bucket, largest = Bucket(rate.burst, 0), burst
    for passed_ms, tokens in steps:
        now_ms += passed_ms
        bucket = bucket.at(now_ms, rate)
        missing_ms = bucket.missing_ms(tokens, rate)
        if missing_ms:
            assert bucket.at(now_ms + missing_ms, rate).missing_ms(tokens, rate) == 0
            assert bucket.at(now_ms + missing_ms - 1, rate).missing_ms(tokens, rate) > 0
        else:
            bucket, taken, largest = bucket.less(tokens), taken + tokens, max(largest, tokens)
        assert taken * UNITS <= now_ms * per_minute + largest * UNITS


# ---- the same in Redis


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    per_minute=st.sampled_from([1, 1000, 60_000, 10**8, 10**9]),
    burst=st.sampled_from([1, 1000, 10**8, 10**9]),
    steps=st.lists(st.tuples(st.integers(0, 2 * 10**6), st.integers(-(10**6), 10**6)), min_size=1, max_size=12),
)
def test_the_script_does_as_the_model_says(
    redis_server: EmbeddedRedis, key_prefix: str, per_minute: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    """Between two takes Redis's clock moves on by itself, which the script's own record of it tells."""

    async def test() -> None:
        rate, key = Rate(per_minute, burst), f"{{{key_prefix}}}:tokens:t"
        async with client_of(redis_server) as redis:
            await redis.delete(key)
            script, model = redis.register_script(TAKE), None
            for tokens, owed in steps:
                missing_ms, level = await script([key], [per_minute, rate.burst, tokens * UNITS, owed * UNITS])
                at_ms = int((await redis.hget(key, "at_ms")) or 0)  # type: ignore[misc]
                model = (model or Bucket(rate.burst, at_ms)).at(at_ms, rate).less(owed)
                model = Bucket(min(model.level, rate.burst), at_ms)
                assert missing_ms == model.missing_ms(tokens, rate)
                model = model if missing_ms else model.less(tokens)
                assert level == model.level
                full_ms = (rate.burst - level) / per_minute
                assert full_ms <= await redis.pttl(key) <= full_ms + 1001

    run(test)


def test_many_routers_at_once_take_no_more_than_the_rate_and_one_burst(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def test() -> None:
        taken = 0

        async def take_on(buckets: TokenBuckets, until_s: float) -> None:
            nonlocal taken
            while time.monotonic() < until_s:
                if not await buckets.take("t", HOUR, 7):
                    taken += 7

        async with (
            buckets_at(redis_server, key_prefix) as (one, _),
            buckets_at(redis_server, key_prefix) as (two, _),
            buckets_at(redis_server, key_prefix) as (three, _),
        ):
            started_s = time.monotonic()
            await asyncio.gather(*(take_on(b, started_s + 0.4) for b in (one, two, three) for _ in range(3)))
            passed_ms = (time.monotonic() - started_s) * 1000
        assert taken <= HOUR.burst_tokens + passed_ms + 1
        assert taken >= HOUR.burst_tokens, "all of the burst, or this tests nothing"

    run(test)


def test_what_was_not_used_can_be_taken_again_and_what_was_used_beyond_cannot(
    redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def test() -> None:
        slow = Rate(1, 1000)
        async with buckets_at(redis_server, key_prefix) as (buckets, _):
            assert await buckets.take("t", slow, 1000) == 0
            assert await buckets.take("t", slow, 500) > 60
            buckets.settle("t", slow, -600)
            assert await buckets.take("t", slow, 500) == 0
            buckets.settle("t", slow, 400)
            assert await buckets.take("t", slow, 1) == pytest.approx(301 * 60, abs=60)
            assert await buckets.take("other", slow, 1000) == 0

    run(test)


def test_what_is_owed_is_settled_without_another_take(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        slow = Rate(1, 1000)
        async with buckets_at(redis_server, key_prefix) as (one, _), buckets_at(redis_server, key_prefix) as (two, _):
            assert await one.take("t", slow, 1000) == 0
            one.settle("t", slow, -1000)
            one.start()
            async with asyncio.timeout(PATIENCE_S):
                while await two.take("t", slow, 900):
                    pass

    run(test)


def test_keys_are_hash_tagged_and_expire(redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def test() -> None:
        async with buckets_at(redis_server, key_prefix) as (buckets, _), client_of(redis_server) as redis:
            await buckets.take("acme", HOUR, 500)
            assert await redis.keys(f"*{key_prefix}*") == [f"{{{key_prefix}}}:tokens:acme"]
            assert 0 < await redis.pttl(f"{{{key_prefix}}}:tokens:acme") <= 1500

    run(test)


# ---- while Redis is away


def test_without_redis_each_router_has_its_share_of_what_was_left(
    key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(server: EmbeddedRedis) -> None:
        clock = ManualClock()
        async with buckets_at(server, key_prefix, clock, routers=4) as (buckets, told):
            slow = Rate(6000, 1000)
            assert await buckets.take("t", slow, 200) == 0
            os.kill(server.pid, signal.SIGKILL)
            psutil.Process(server.pid).wait(PATIENCE_S)
            assert await buckets.take("t", slow, 200) == 0, "800 were left: 200 for each of four"
            assert buckets.is_local
            assert await buckets.take("t", slow, 25) == 1.0, "1500 a minute is 25 a second"
            clock.advance(1.0)
            assert await buckets.take("t", slow, 25) == 0
            assert await buckets.take("fresh", slow, 250) == 0
            assert await buckets.take("fresh", slow, 250) > 0
            assert told == [True]

    with EmbeddedRedis() as server:
        run(lambda: test(server))
    assert sum("does not answer for token rates" in line for line in caplog.messages) == 1


def test_when_redis_is_back_what_was_taken_meanwhile_is_laid_on_the_shared_bucket(key_prefix: str) -> None:
    async def test(server: EmbeddedRedis) -> None:
        slow = Rate(1, 1000)
        async with buckets_at(server, key_prefix, routers=2) as (buckets, told):
            buckets.start()
            os.kill(server.pid, signal.SIGKILL)
            psutil.Process(server.pid).wait(PATIENCE_S)
            assert await buckets.take("t", slow, 400) == 0
            buckets.settle("t", slow, -100)
            server.start()  # empty: a full bucket
            async with asyncio.timeout(PATIENCE_S):
                while buckets.is_local:  # noqa: ASYNC110 - nobody but tests waits for it, so there is no event
                    await asyncio.sleep(0.005)
            assert told == [True, False]
            async with buckets_at(server, key_prefix) as (other, _):
                assert await other.take("t", slow, 701) > 0
                assert await other.take("t", slow, 700) == 0

    with EmbeddedRedis() as server:
        run(lambda: test(server))


def test_a_redis_that_hangs_counts_as_away(key_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_bucket, "TAKE_TIMEOUT_S", 0.25)

    async def test(server: EmbeddedRedis) -> None:
        async with buckets_at(server, key_prefix) as (buckets, _):
            assert await buckets.take("t", HOUR, 1) == 0
            os.kill(server.pid, signal.SIGSTOP)
            try:
                started_s = time.monotonic()
                taken = await asyncio.gather(*(buckets.take("t", HOUR, 1) for _ in range(40)))
                assert not any(taken)
                assert time.monotonic() - started_s < 20.0, "not a second for each"
                assert buckets.is_local
            finally:
                os.kill(server.pid, signal.SIGCONT)

    with EmbeddedRedis() as server:
        run(lambda: test(server))
