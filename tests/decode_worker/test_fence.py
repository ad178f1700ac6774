"""Blocks are used again when nobody can write into them any more, and not before."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from baton.ids import RequestId
from decode_worker import fence as fence_module
from decode_worker.fence import Fence, Unsettled

REQUEST = RequestId("r")


class HeldTickets:
    """Each ticket settles when the test says so."""

    def __init__(self) -> None:
        self.closed: list[RequestId] = []
        self.settled: defaultdict[RequestId, asyncio.Event] = defaultdict(asyncio.Event)

    def close_ticket(self, request_id: RequestId) -> None:
        self.closed.append(request_id)

    async def settle(self, request_id: RequestId) -> None:
        assert request_id in self.closed, "a ticket is closed before it is settled"
        await self.settled[request_id].wait()


class Rig:
    def __init__(self) -> None:
        self.tickets, self.registry = HeldTickets(), CollectorRegistry()
        self.reclaimed: list[RequestId] = []
        self.fence = Fence(self.tickets, self.reclaimed.append, self.registry)

    async def unsettled(self, ticket: str) -> Unsettled:
        with pytest.raises(Unsettled) as raised:
            await self.fence.shut(RequestId(ticket))
        return raised.value

    @property
    def quarantined(self) -> float | None:
        return self.registry.get_sample_value("baton_kv_blocks_quarantined")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence_module, "SETTLE_TIMEOUT_S", 0.02)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a fence tells nobody
            await asyncio.sleep(0)


def test_a_ticket_that_settles_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence_module, "SETTLE_TIMEOUT_S", 30)

    async def main() -> None:
        rig = Rig()
        shutting = asyncio.create_task(rig.fence.shut(RequestId("r/0")))
        await asyncio.sleep(0)
        assert rig.tickets.closed == ["r/0"]
        rig.tickets.settled[RequestId("r/0")].set()
        await shutting
        assert rig.quarantined == 0
        assert rig.reclaimed == []

    asyncio.run(main())


def test_blocks_are_reclaimed_when_the_last_ticket_of_the_request_is_settled() -> None:
    async def main() -> None:
        rig = Rig()
        for number, blocks in ((0, 5), (1, 4)):
            rig.fence.quarantine(REQUEST, blocks, await rig.unsettled(f"r/{number}"))
        assert rig.quarantined == 9
        rig.tickets.settled[RequestId("r/1")].set()
        await until(lambda: rig.quarantined == 5)
        assert rig.reclaimed == []
        rig.tickets.settled[RequestId("r/0")].set()
        await until(lambda: rig.quarantined == 0)
        assert rig.reclaimed == [REQUEST]

    asyncio.run(main())


def test_a_worker_that_stops_waits_no_longer() -> None:
    async def main() -> None:
        rig = Rig()
        rig.fence.quarantine(REQUEST, 5, await rig.unsettled("r/0"))
        await rig.fence.close()
        assert rig.reclaimed == []

    asyncio.run(main())
