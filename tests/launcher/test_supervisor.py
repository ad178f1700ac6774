import asyncio
from collections.abc import Sequence

import pytest

from baton.errors import Unavailable
from launcher import supervisor
from launcher.ray_cluster import WorkerLost
from launcher.supervisor import first_start, retry_delay_s, until_restarted, watch_over
from launcher.worker_actor import StartOutcome

SERVES, FAILS = StartOutcome(address="h:1"), StartOutcome(failure="No such model.")
LOST = WorkerLost("decode-0 was lost.")


class Scripted:
    """A worker whose lives go as written; `killed` counts how often one was ended."""

    name = "decode-0"

    def __init__(self, *outcomes: StartOutcome | WorkerLost) -> None:
        self._outcomes: list[StartOutcome | WorkerLost] = list(outcomes)
        self.killed = 0
        self.deaths = asyncio.Semaphore(0)
        self.exhausted = asyncio.Event()

    async def outcome(self) -> StartOutcome:
        if not self._outcomes:
            self.exhausted.set()
            await asyncio.Event().wait()
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, WorkerLost):
            raise outcome
        return outcome

    async def until_death(self) -> None:
        await self.deaths.acquire()
        raise LOST

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> Sequence[float]:
    """The waits between tries, which tests skip."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def no_sleep(delay_s: float) -> None:
        slept.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(supervisor.asyncio, "sleep", no_sleep)
    return slept


def test_a_first_start_that_serves_is_well() -> None:
    asyncio.run(first_start(Scripted(SERVES), timeout_s=1))


@pytest.mark.parametrize(("outcome", "says"), [(FAILS, "decode-0 .*No such model"), (LOST, "died while it started")])
def test_a_first_start_that_fails_is_not_tried_again(outcome: StartOutcome | WorkerLost, says: str) -> None:
    worker = Scripted(outcome)
    with pytest.raises(Unavailable, match=says):
        asyncio.run(first_start(worker, timeout_s=1))
    assert worker.killed == 0


def test_a_first_start_has_its_time() -> None:
    with pytest.raises(Unavailable, match=r"within 0\.01 s"):
        asyncio.run(first_start(Scripted(), timeout_s=0.01))


def test_a_restart_is_waited_for(delays: Sequence[float]) -> None:
    worker = Scripted(LOST, LOST, SERVES)
    asyncio.run(until_restarted(worker))
    assert worker.killed == 0 and delays == [0.5, 1.0]


def test_a_restart_that_fails_is_tried_again_ever_later(
    delays: Sequence[float], caplog: pytest.LogCaptureFixture
) -> None:
    worker = Scripted(*[FAILS] * 9, SERVES)
    asyncio.run(until_restarted(worker))
    assert worker.killed == 9
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert "No such model." in caplog.text


def test_the_watch_goes_on_after_each_death(delays: Sequence[float]) -> None:
    async def test() -> None:
        worker = Scripted(SERVES, LOST, SERVES)
        watching = asyncio.create_task(watch_over(worker))
        for _ in range(3):
            worker.deaths.release()
        await worker.exhausted.wait()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(test())
    assert delays == [0.5]


def test_the_delay_is_bounded() -> None:
    assert retry_delay_s(10**6) == 30.0
