import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.clock import ManualClock
from baton.cluster.served_tokens import Share
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, RateLimited, Unavailable
from baton.settings import RouterSettings
from router.admission.admission import Admission, Turn, TurnRequest
from router.admission.metrics import AdmissionMetrics
from router.admission.request_class import RequestClass
from router.admission.tenants import OPEN, Tenant
from router.admission.turn_line import NO_WORKER_S_MAX

A, B = Tenant(name="a"), Tenant(name="b")


@dataclass
class Workers:
    """As many free places as are said; each request placed takes one."""

    free: float = 1
    placed: int = 0

    def queue_s(self, model: str) -> float:
        del model
        if self.free == -math.inf:
            return math.inf
        return 0.0 if self.placed < self.free else 60.0


@dataclass
class Limits:
    """Answers of the shared limits, and what they were told."""

    wait_s: float = 0.0
    elsewhere: int = 0
    told: list[int] = field(default_factory=list)
    answer: asyncio.Event | None = None

    async def take(self, tenant: Tenant, tokens: int) -> float:
        del tenant
        if self.answer is not None:
            await self.answer.wait()
        if not self.wait_s:
            self.told.append(tokens)
        return self.wait_s

    def settle(self, tenant: Tenant, tokens: int) -> None:
        del tenant
        self.told.append(tokens)

    def requests_elsewhere(self, tenant: Tenant) -> int:
        del tenant
        return self.elsewhere


class Rig:
    def __init__(self, free: float = 1, limits: Limits | None = None, **settings: Any) -> None:
        self.workers, self.clock, self.registry = Workers(free), ManualClock(), CollectorRegistry()
        self.admission = Admission(
            RouterSettings(**settings), self.workers, AdmissionMetrics(self.registry), self.clock, limits
        )
        self.served: list[str] = []
        self.turns: list[Turn] = []

    def request(self, tenant: Tenant = OPEN, request_class: RequestClass = "standard", **fields: Any) -> TurnRequest:
        defaults: dict[str, Any] = {"model": "m", "prompt_tokens": 100, "max_tokens": 20}
        return TurnRequest(tenant, request_class, **defaults | fields)

    async def serve(self, label: str = "", tenant: Tenant = OPEN, *args: Any, **fields: Any) -> None:
        """Places itself as soon as it has its turn, as the generator does."""
        self.turns.append(await self.admission.turn(self.request(tenant, *args, **fields)))
        self.workers.placed += 1
        self.served.append(label)

    def send(self, label: str, *args: Any, **fields: Any) -> asyncio.Task[None]:
        return asyncio.create_task(self.serve(label, *args, **fields), name=label)

    def finish(self, used_tokens: int = 120) -> None:
        """The oldest of those that run."""
        self.workers.placed -= 1
        self.turns.pop(0).close(used_tokens)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def settle() -> None:
    """Lets all tasks run as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def failure(task: Awaitable[None]) -> BaseException:
    with pytest.raises(BatonError) as caught:
        async with asyncio.timeout(30):
            await task
    return caught.value


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


# ---- turns


def test_where_there_is_room_a_turn_comes_at_once() -> None:
    rig = Rig()
    turn = rig.admission.turn(rig.request())
    with pytest.raises(StopIteration) as done:
        turn.send(None)  # it never gives way to other tasks
    assert isinstance(done.value.value, Turn)
    assert rig.metric("baton_queue_wait_seconds_count", model="m", **{"class": "standard"}) == 1


def test_turns_come_one_at_a_time_as_workers_have_room() -> None:
    async def test() -> None:
        rig = Rig(free=2)
        tasks = [rig.send(str(i)) for i in range(5)]
        await settle()
        assert rig.served == ["0", "1"]
        assert rig.admission.waiting == 3
        assert rig.metric("baton_queue_requests", model="m", **{"class": "standard"}) == 3
        rig.finish()
        await settle()
        assert rig.served == ["0", "1", "2"]
        rig.workers.free = 10
        rig.admission.poke("m")
        rig.admission.poke()
        await settle()
        assert rig.served == ["0", "1", "2", "3", "4"]
        await asyncio.gather(*tasks)
        assert rig.admission.waiting == 0

    run(test)


def test_room_is_found_without_a_poke() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        task = rig.send("")
        await settle()
        assert not task.done()
        rig.workers.free = 1
        async with asyncio.timeout(30):
            await task

    run(test)


def test_the_urgent_pass_and_tenants_take_turns() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        tasks = [
            *(rig.send(f"a{i}", A) for i in range(3)),
            *(rig.send(f"b{i}", B) for i in range(2)),
            rig.send("urgent", A, "interactive"),
        ]
        await settle()
        rig.workers.free = 10
        rig.admission.poke("m")
        await settle()
        assert rig.served == ["urgent", "a0", "b0", "a1", "b1", "a2"]
        await asyncio.gather(*tasks)

    run(test)


def test_one_model_does_not_hold_up_another() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        waits = rig.send("m")
        await settle()
        rig.workers.free = 1
        await rig.serve("other", model="other")
        assert rig.served == ["other"]
        rig.finish()
        await waits

    run(test)


def test_a_client_that_leaves_is_out_of_the_queue_at_once() -> None:
    async def test() -> None:
        limits = Limits()
        rig = Rig(free=0, limits=limits)
        task = rig.send("", Tenant(name="a", tokens_per_minute=1000))
        await settle()
        assert rig.admission.waiting == 1
        task.cancel()
        await settle()
        assert task.cancelled()
        assert rig.admission.waiting == 0
        assert sum(limits.told) == 0
        assert not any(rig.admission.requests.values())

    run(test)


@pytest.mark.parametrize("released_first", [True, False])
def test_a_client_that_leaves_in_the_moment_of_its_turn_gives_it_back(released_first: bool) -> None:
    async def test() -> None:
        rig = Rig(free=0)
        leaver, other = rig.send("leaver", A), rig.send("other", B)
        await settle()
        rig.workers.free = 1
        rig.admission.poke("m")
        if not released_first:
            leaver.cancel()
        await asyncio.sleep(0)
        leaver.cancel()
        await settle()
        assert leaver.cancelled()
        assert rig.served == ["other"]
        assert rig.admission.served_tokens() == {
            Share("m", "standard", "a"): 0,
            Share("m", "standard", "b"): 120,
        }
        await other

    run(test)


def test_a_turn_is_settled_once_by_what_was_used() -> None:
    async def test() -> None:
        limits = Limits()
        rig = Rig(limits=limits)
        await rig.serve("", Tenant(name="a", tokens_per_minute=1000))
        assert limits.told == [120]
        turn = rig.turns[0]
        turn.close(105)
        turn.close(105)
        assert limits.told == [120, -15]
        assert rig.metric("baton_tenant_tokens_total", tenant="a") == 105
        assert rig.admission.served_tokens() == {Share("m", "standard", "a"): 105}

    run(test)


def test_what_a_request_will_generate_is_learned() -> None:
    async def test() -> None:
        limits = Limits()
        rig = Rig(free=99, limits=limits)
        tenant = Tenant(name="a", tokens_per_minute=1000)
        for _ in range(100):
            await rig.serve("", tenant, max_tokens=4000, sequences=2)
            rig.finish(100 + 2 * 30)
        limits.told.clear()
        await rig.serve("", tenant, max_tokens=4000, sequences=2)
        assert limits.told == [160]

    run(test)


def test_what_other_routers_gave_counts_where_it_was_given() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        tasks = [rig.send(f"{tenant.name}{i}", tenant) for i in range(2) for tenant in (A, B)]
        await settle()
        weights = {"a": 1.0, "b": 1.0}
        rig.admission.served_elsewhere({Share("other", "standard", "b"): 999, Share("m", "batch", "b"): 999}, weights)
        rig.admission.served_elsewhere({Share("m", "standard", "a"): 500, Share("m", "?", "b"): 999}, weights)
        rig.workers.free = 9
        rig.admission.poke()
        await asyncio.gather(*tasks)
        assert rig.served == ["b0", "b1", "a0", "a1"]

    run(test)


# ---- refusals


def test_a_full_queue_refuses_at_once() -> None:
    async def test() -> None:
        rig = Rig(free=0, queue_max=2)
        tasks = [rig.send("", A), rig.send("", B)]
        await settle()
        error = await failure(rig.serve("", A))
        assert isinstance(error, Overloaded)
        assert not isinstance(error, RateLimited)
        assert error.retry_after_s >= 1
        assert "2 requests" in str(error)
        assert rig.metric("baton_requests_refused_total", reason="queue_full", tenant="a") == 1
        rig.workers.free = 9
        await asyncio.gather(*tasks)

    run(test)


def test_in_a_full_queue_the_least_urgent_gives_way() -> None:
    async def test() -> None:
        rig = Rig(free=0, queue_max=1)
        batch = rig.send("batch", A, "batch")
        await settle()
        urgent = rig.send("urgent", B, "interactive")
        error = await failure(batch)
        assert isinstance(error, Overloaded)
        assert "gave way" in str(error)
        assert rig.metric("baton_requests_refused_total", reason="displaced", tenant="a") == 1
        rig.workers.free = 1
        await urgent
        assert rig.served == ["urgent"]

    run(test)


def test_what_cannot_meet_its_deadline_is_refused_at_once() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        error = await failure(rig.serve("", A, deadline_s=30.0))
        assert isinstance(error, Overloaded)
        assert "deadline" in str(error)
        assert error.retry_after_s == 30
        assert rig.metric("baton_requests_refused_total", reason="deadline", tenant="a") == 1

    run(test)


def test_a_deadline_that_has_passed_is_refused_even_where_there_is_room() -> None:
    async def test() -> None:
        rig = Rig()
        rig.clock.advance(1.0)
        assert isinstance(await failure(rig.serve("", deadline_s=0.5)), Overloaded)

    run(test)


def test_the_deadline_may_pass_in_line() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        task = rig.send("", A, deadline_s=61.0)
        await settle()
        rig.clock.advance(61.0)
        assert isinstance(await failure(task), DeadlineExceeded)
        assert rig.admission.waiting == 0
        assert not any(rig.admission.requests.values())

    run(test)


def test_the_servers_own_time_limit_is_a_deadline_too() -> None:
    async def test() -> None:
        rig = Rig(free=0, request_timeout_s=100)
        task = rig.send("")
        await settle()
        rig.clock.advance(100.0)
        assert isinstance(await failure(task), DeadlineExceeded)

    run(test)


def test_without_a_worker_nobody_joins_and_those_who_wait_do_so_for_a_while() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        task = rig.send("")
        await settle()
        rig.workers.free = -math.inf
        assert isinstance(await failure(rig.serve("")), Unavailable)
        rig.admission.poke("m")
        await settle()
        rig.clock.advance(NO_WORKER_S_MAX - 1)
        rig.admission.poke("m")
        await settle()
        assert not task.done()
        rig.clock.advance(1)
        assert isinstance(await failure(task), Unavailable)

    run(test)


def test_a_worker_that_comes_back_in_time_serves_who_waited() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        task = rig.send("")
        await settle()
        for free in (-math.inf, 0, -math.inf):
            rig.workers.free = free
            rig.admission.poke("m")
            await settle()
            rig.clock.advance(NO_WORKER_S_MAX - 1)
        rig.workers.free = 1
        await task

    run(test)


def test_past_the_tenants_rate_it_is_told_when_to_come_back() -> None:
    async def test() -> None:
        rig = Rig(limits=Limits(wait_s=12.3))
        error = await failure(rig.serve("", Tenant(name="a", tokens_per_minute=1000)))
        assert isinstance(error, RateLimited)
        assert error.retry_after_s == 12.3
        assert "1000 tokens a minute" in str(error)
        assert not any(rig.admission.requests.values())
        await rig.serve("", B)

    run(test)


def test_requests_at_a_time_count_on_all_routers() -> None:
    async def test() -> None:
        limits = Limits(elsewhere=1)
        rig = Rig(free=9, limits=limits)
        tenant = Tenant(name="a", requests_max=3)
        await rig.serve("", tenant)
        await rig.serve("", tenant)
        assert isinstance(await failure(rig.serve("", tenant)), RateLimited)
        rig.finish()
        await rig.serve("", tenant)
        assert rig.admission.requests["a"] == 2

    run(test)


def test_what_is_refused_gets_its_tokens_back() -> None:
    async def test() -> None:
        limits = Limits()
        rig = Rig(free=0, limits=limits, queue_max=0)
        error = await failure(rig.serve("", Tenant(name="a", tokens_per_minute=1000)))
        assert isinstance(error, Overloaded)
        assert limits.told == [120, -120]

    run(test)


# ---- shutting down


def test_closing_sends_away_who_waits_and_who_comes() -> None:
    async def test() -> None:
        rig = Rig(free=0)
        task = rig.send("")
        await settle()
        rig.admission.close()
        assert isinstance(await failure(task), Unavailable)
        assert isinstance(await failure(rig.serve("")), Unavailable)
        with pytest.raises(Unavailable):
            rig.admission.enter()
        rig.admission.close()

    run(test)


def test_closing_while_redis_is_asked_sends_away_too() -> None:
    async def test() -> None:
        limits = Limits(answer=asyncio.Event())
        rig = Rig(limits=limits)
        task = rig.send("", Tenant(name="a", tokens_per_minute=1000))
        await settle()
        rig.admission.close()
        assert limits.answer is not None
        limits.answer.set()
        assert isinstance(await failure(task), Unavailable)
        assert sum(limits.told) == 0

    run(test)


# ---- places


def test_places_are_bounded_and_given_back_once() -> None:
    async def test() -> None:
        rig = Rig(requests_max=3)
        with rig.admission.enter() as place:
            place.widen(3)
            with pytest.raises(Overloaded):
                rig.admission.enter()
            assert rig.metric("baton_requests_refused_total", reason="places", tenant="") == 1
            place.close()
            assert rig.admission.in_flight == 0
        assert rig.admission.in_flight == 0
        await rig.admission.idle()
        with rig.admission.enter() as place, pytest.raises(InvalidRequest):
            place.widen(4)

    run(test)
