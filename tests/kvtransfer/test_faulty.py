"""The faulty transport does what its plan says, and keeps the one promise that hardware keeps."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from faulty import TRANSPORT, Fault, FaultPlan, Faults, Kind
from transfer_rig import REQUEST, Pair, ids, pair, slices

from baton.errors import TransferError
from kvtransfer.interface import Connection
from kvtransfer.registry import BUILT_IN

ALWAYS = 10**6
Scenario = Callable[[Pair, Connection], Coroutine[Any, Any, None]]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()
    monkeypatch.setitem(BUILT_IN, TRANSPORT, faults.transport)
    return faults


def run(faults: Faults, scenario: Scenario, *planned: Fault) -> None:
    async def body() -> None:
        async with asyncio.timeout(30), pair(TRANSPORT) as ends:
            faults.plan(REQUEST, FaultPlan(1, planned))
            await scenario(ends, await ends.connect(ids(1, 2, 3)))
            await faults.settle()

    asyncio.run(body())


def first(kind: Kind, delay_s: float = 0.0) -> Fault:
    return Fault(kind, 0, 0, delay_s)


def differing(ends: Pair) -> int:
    """Bytes of target blocks 1 to 3 in layer 0 that are not those of source blocks 1 to 3."""
    return int((slices(ends.target)[0, :, 1:4] != slices(ends.source)[0, :, 1:4]).sum())


async def send(connection: Connection) -> None:
    await connection.write(0, ids(1, 2, 3), ids(1, 2, 3))
    await connection.fence()


def test_plans_are_their_seeds() -> None:
    plans = [FaultPlan.of(seed) for seed in range(300)]
    assert plans == [FaultPlan.of(seed) for seed in range(300)]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(Kind)


@pytest.mark.parametrize("kind", [Kind.DELAY, Kind.DUPLICATE, Kind.REORDER])
def test_what_is_only_late_or_twice_is_there_after_the_fence(faults: Faults, kind: Kind) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        await send(connection)
        assert differing(ends) == 0
        assert faults.happened[kind] == 1

    run(faults, scenario, first(kind))


@pytest.mark.parametrize("kind", [Kind.DROP, Kind.TRUNCATE, Kind.CORRUPT])
def test_what_gets_lost_is_not_there_after_the_fence(faults: Faults, kind: Kind) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        await send(connection)
        assert differing(ends) == 1 if kind is Kind.CORRUPT else differing(ends) > 1
        await send(connection)
        assert differing(ends) == 0, "the second time all is well"

    run(faults, scenario, first(kind))


def test_a_fence_that_is_dropped_waits_for_nothing(faults: Faults) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        await send(connection)
        assert differing(ends) > 1

    run(faults, scenario, first(Kind.REORDER), Fault(Kind.DROP, 1, 1, 0.01))


@pytest.mark.parametrize("kind", [Kind.LATE, Kind.TORN])
def test_what_lands_late_lands_in_closed_tickets_and_settle_waits_for_it(faults: Faults, kind: Kind) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        try:
            await send(connection)
        except TransferError:
            assert kind is Kind.TORN
        ends.receiver.close_ticket(REQUEST)
        assert not slices(ends.target).any()
        await ends.receiver.settle(REQUEST)
        assert slices(ends.target).any()
        assert (differing(ends) == 0) == (kind is Kind.LATE)

    run(faults, scenario, first(kind, delay_s=0.02))


def test_a_connection_that_broke_stays_broken(faults: Faults) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        for _ in range(2):
            with pytest.raises(TransferError, match="The connection broke"):
                await send(connection)
        assert not slices(ends.target).any()

    run(faults, scenario, first(Kind.BREAK))


@pytest.mark.parametrize("how", ["stalls", "is dead"])
def test_what_does_not_end_ends_when_it_is_closed(faults: Faults, how: str) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        if how == "is dead":
            faults.dead.append(ends.source)
        sending = asyncio.ensure_future(send(connection))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.shield(sending)
        await connection.close()
        with pytest.raises(TransferError):
            await sending
        assert not slices(ends.target).any()

    run(faults, scenario, *([first(Kind.STALL)] if how == "stalls" else []))


def test_faults_go_on_as_long_as_planned(faults: Faults) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        for _ in range(3):
            await send(connection)
            assert differing(ends) > 0
        assert faults.happened[Kind.CORRUPT] == 6, "writes and fences, though a fence has nothing to corrupt"

    run(faults, scenario, Fault(Kind.CORRUPT, 0, ALWAYS, 0))


def test_requests_without_a_plan_go_undisturbed(faults: Faults) -> None:
    async def scenario(ends: Pair, connection: Connection) -> None:
        await send(connection)
        assert differing(ends) == 0

    run(faults, scenario)
    assert not faults.happened
