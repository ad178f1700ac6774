"""Several routers' admissions, held together by a real Redis, and their queues without one."""

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from baton.clock import ManualClock
from baton.cluster import token_bucket
from baton.cluster.lease import Lease
from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.cluster.served_tokens import ServedElsewhere, ServedTokens, Share
from baton.errors import RateLimited, SettingsError
from baton.settings import RouterSettings
from router.admission.admission import Admission, TurnRequest
from router.admission.fair_queue import Ask
from router.admission.metrics import AdmissionMetrics
from router.admission.shared_limits import SharedLimits
from router.admission.tenancy import Tenancy
from router.admission.tenants import Tenant
from router.admission.turn_queue import Joined, TurnQueue

KEY = "sk-0123456789abcdef0123"
PATIENCE_S = 60.0
FAR_S = 1e9


def tenants_file(directory: Path, terms: str) -> Path:
    path = directory / "tenants.yaml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    path.write_text(f"tenants:\n- name: acme\n  api_keys_sha256: ['{digest}']\n{terms}")
    return path


class AlwaysRoom:
    """Workers that would begin anything at once: nobody ever waits."""

    def queue_s(self, model: str) -> float:
        del model
        return 0.0


class Router:
    """As much of a router as admission is."""

    def __init__(self, tenancy: Tenancy, admission: Admission, registry: CollectorRegistry) -> None:
        self.tenancy, self.admission, self.registry = tenancy, admission, registry

    def request(self, **fields: Any) -> TurnRequest:
        tenant = self.tenancy.tenants.authenticate(f"Bearer {KEY}")
        defaults: dict[str, Any] = {"model": "m", "prompt_tokens": 90, "max_tokens": 10}
        return TurnRequest(tenant, tenant.class_of(None), **defaults | fields)


@asynccontextmanager
async def routers(server: EmbeddedRedis, prefix: str, file: Path | None, *names: str) -> AsyncIterator[list[Router]]:
    async with AsyncExitStack() as stack:
        started = []
        for name in names:
            client = redis_client(server.url)
            stack.push_async_callback(client.aclose)
            settings, registry = RouterSettings(tenants_file=file, key_prefix=prefix), CollectorRegistry()
            metrics = AdmissionMetrics(registry)
            tenancy = Tenancy(settings, client, name, metrics)
            stack.push_async_callback(tenancy.close)
            admission = Admission(settings, AlwaysRoom(), metrics, limits=tenancy.limits)
            await tenancy.start(admission)
            started.append(Router(tenancy, admission, registry))
        yield started


@pytest.fixture(autouse=True)
def answers_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that is there must be heard, on however busy a machine."""
    monkeypatch.setattr(token_bucket, "TAKE_TIMEOUT_S", PATIENCE_S)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - nobody but tests waits for it, so there is no event
            await asyncio.sleep(0.01)


def test_one_rate_holds_for_all_routers(redis_server: EmbeddedRedis, key_prefix: str, tmp_path: Path) -> None:
    async def test() -> None:
        file = tenants_file(tmp_path, "  tokens_per_minute: 300\n")
        async with routers(redis_server, key_prefix, file, "r1", "r2") as (one, two):
            turns = [await router.admission.turn(router.request()) for router in (one, two, one)]
            with pytest.raises(RateLimited) as refused:
                await two.admission.turn(two.request())
            assert 15 <= refused.value.retry_after_s <= 20, "a hundred tokens at three hundred a minute"
            turns[1].close(0)  # it came to nothing: the next has its tokens
            (await two.admission.turn(two.request())).close(100)

    run(test)


def test_requests_at_a_time_hold_for_all_routers_and_what_is_served_is_told(
    redis_server: EmbeddedRedis, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        file = tenants_file(tmp_path, "  requests_max: 2\n  weight: 3\n")
        async with routers(redis_server, key_prefix, file, "r1", "r2") as (one, two):
            told: list[tuple[Mapping[Share, int], Mapping[str, float]]] = []
            monkeypatch.setattr(two.admission, "served_elsewhere", lambda *news: told.append(news))
            acme = one.request().tenant
            turns = [await one.admission.turn(one.request()) for _ in range(2)]
            await until(lambda: two.tenancy.limits.requests_elsewhere(acme) == 2)
            with pytest.raises(RateLimited):
                await two.admission.turn(two.request())
            for turn in turns:
                turn.close(70)
            await until(lambda: two.tenancy.limits.requests_elsewhere(acme) == 0)
            (await two.admission.turn(two.request())).close(70)
            share = Share("m", "standard", "acme")
            await until(lambda: sum(tokens[share] for tokens, _ in told) == 140)
            assert all(weights == {"acme": 3.0} for _, weights in told)

    run(test)


def test_while_redis_is_away_each_router_keeps_to_its_share(key_prefix: str) -> None:
    fast = Lease(heartbeat_s=0.05, expiry_s=5.0, poll_s=0.02, retry_max_s=0.05)
    acme = Tenant(name="acme", requests_max=10, tokens_per_minute=60, burst_tokens=1000)

    async def test(server: EmbeddedRedis) -> None:
        async with AsyncExitStack() as stack:
            started, told = [], list[bool]()
            for name in ("r1", "r2"):
                client = redis_client(server.url)
                stack.push_async_callback(client.aclose)
                limits = SharedLimits(client, key_prefix, name, "1", told.append, lease=fast)
                stack.push_async_callback(limits.close)
                await limits.start(dict, lambda: {"acme": 3}, lambda _: None)
                started.append(limits)
            one = started[0]
            await until(lambda: one.requests_elsewhere(acme) == 3)
            assert await one.take(acme, 200) == 0
            os.kill(server.pid, signal.SIGKILL)
            psutil.Process(server.pid).wait(PATIENCE_S)
            await until(lambda: one.requests_elsewhere(acme) == 5)
            assert await one.take(acme, 390) == 0, "of the 800 left about half is its share"
            assert await one.take(acme, 100) > 10
            server.start()
            await until(lambda: one.requests_elsewhere(acme) == 3 and told.count(False) == told.count(True))
            assert await one.take(acme, 500) == 0

    with EmbeddedRedis() as server:
        run(lambda: test(server))


def test_a_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    settings = RouterSettings(tenants_file=tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        Tenancy(settings, redis_client("redis://127.0.0.1:1"), "r", AdmissionMetrics(CollectorRegistry()))


def test_without_a_file_redis_is_not_needed() -> None:
    async def test() -> None:
        metrics = AdmissionMetrics(CollectorRegistry())
        tenancy = Tenancy(RouterSettings(), None, "r", metrics)
        admission = Admission(RouterSettings(), AlwaysRoom(), metrics, ManualClock(), tenancy.limits)
        await tenancy.start(admission)
        tenant = tenancy.tenants.authenticate(None)
        (await admission.turn(TurnRequest(tenant, tenant.class_of(None), "m", 1, 1))).close(2)
        await tenancy.close()

    run(test)


@given(st.lists(st.integers(1, 2000), min_size=40, max_size=60), st.integers(1, 5))
def test_a_tenant_that_spreads_over_routers_gets_one_share(sizes: list[int], told_every: int) -> None:
    """`a` waits at two routers, `b` at the first alone; both routers let as many requests through."""
    queues = [TurnQueue(1000), TurnQueue(1000)]
    elsewhere = [ServedElsewhere("r0"), ServedElsewhere("r1")]
    for tokens in sizes:
        for queue, tenant in ((queues[0], "a"), (queues[0], "b"), (queues[1], "a")):
            assert isinstance(queue.join(Ask(tenant, 1.0, "standard", tokens, FAR_S), 0.0, 0.0), Joined)
    for step in range(len(sizes)):
        for queue in queues:
            queue.release(0.0)
        if step % told_every == 0:
            _tell(queues, elsewhere)
    first, second = (queue.served_tokens("standard") for queue in queues)
    # What `a` is given at the second router it does not get at the first, where `b` has not had as much yet. Beyond
    # that: one request of each, and what was given before the routers heard of each other again.
    assert first["a"] <= max(0, first["b"] - second["a"]) + (2 + 2 * told_every) * max(sizes)


def _tell(queues: list[TurnQueue], elsewhere: list[ServedElsewhere]) -> None:
    records = []
    for i, queue in enumerate(queues):
        served = queue.served_tokens("standard").items()
        rows = tuple((Share("m", "standard", tenant), tokens) for tenant, tokens in served)
        records.append(ServedTokens(router_id=f"r{i}", epoch="1", served=rows))
    for i, queue in enumerate(queues):
        news = {share.tenant: tokens for share, tokens in elsewhere[i].news(records).items()}
        queue.served_elsewhere("standard", news, {"a": 1.0, "b": 1.0})
