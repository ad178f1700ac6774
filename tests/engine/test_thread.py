import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from fake_tiers import FakeTiers, ToyRows
from toy_engine import ToyEngine, ToyLogits, toy_reference

from baton.errors import InvalidRequest, Overloaded, Unavailable, UnsupportedModel
from baton.ids import RequestId
from baton.sampling import SamplingParams
from engine import thread
from engine.core import LocalEngine
from engine.interface import EngineRequest, Prefill, StepResult
from engine.thread import EngineThread

A = RequestId("a")
WAIT_S = 60
ToyThread = EngineThread[LocalEngine[ToyLogits]]


def request(name: str = "a", max_tokens: int = 4, prefill: Prefill = Prefill.HERE) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(RequestId(name), (1, 2, 3), params, prefill)


class Heard:
    """What the loop was told."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.threads: set[str] = set()
        self._changed = asyncio.Event()

    def __call__(self, result: StepResult) -> None:
        self.results.append(result)
        self.threads.add(threading.current_thread().name)
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def tokens(self, name: str = "a") -> list[int]:
        return [t for result in self.results for g in result.generated if g.request_id == name for t in g.token_ids]


@asynccontextmanager
async def engine_thread(heard: Callable[[StepResult], None], toy: ToyEngine | None = None) -> AsyncIterator[ToyThread]:
    made = (toy or ToyEngine()).engine
    owner = EngineThread(lambda: made, heard, asyncio.get_running_loop())
    await owner.started()
    try:
        yield owner
    finally:
        await owner.stop()
        assert not owner._thread.is_alive()


def test_serves_a_request_on_its_own_thread() -> None:
    async def main() -> None:
        toy, heard = ToyEngine(), Heard()
        async with engine_thread(heard, toy) as owner:
            name = await owner.call(lambda engine: (engine.add(request()), threading.current_thread().name)[1])
            assert name == "engine"
            await heard.until(lambda: len(heard.tokens()) == 4)
            assert owner.model is toy.model
            assert owner.region is toy.region
            assert owner.stats().kv_blocks_used == 0
            assert owner.stats().steps == 4
        assert heard.threads == {"MainThread"}
        assert toy.region.is_closed
        direct = ToyEngine()
        direct.add("a", (1, 2, 3))
        direct.run()
        assert heard.tokens() == direct.outputs[A]

    asyncio.run(main())


def test_errors_are_raised_in_the_caller_and_the_engine_goes_on() -> None:
    async def main() -> None:
        heard = Heard()
        async with engine_thread(heard) as owner:
            with pytest.raises(InvalidRequest):
                await owner.call(lambda engine: engine.add(EngineRequest(A, (), SamplingParams(), Prefill.HERE)))
            await owner.call(lambda engine: engine.add(request()))
            await heard.until(lambda: len(heard.tokens()) == 4)

    asyncio.run(main())


def test_a_posted_command_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with engine_thread(Heard()) as owner:
            owner.post(lambda _: 1 / 0)
            assert await owner.call(lambda _: "alive") == "alive"

    asyncio.run(main())
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def test_statistics_know_of_a_command_when_it_returns() -> None:
    async def main() -> None:
        async with engine_thread(Heard()) as owner:
            await owner.call(lambda engine: engine.add(request(prefill=Prefill.ELSEWHERE)))
            assert owner.stats().waiting_sequences == 1
            await owner.call(lambda engine: engine.abort(A))
            assert owner.stats().waiting_sequences == 0

    asyncio.run(main())


def test_commands_run_in_order_also_after_a_cancelled_call() -> None:
    async def main() -> None:
        heard = Heard()
        async with engine_thread(heard) as owner:
            holding, held = threading.Event(), threading.Event()
            owner.post(lambda _: (held.set(), holding.wait(WAIT_S)))
            adding = asyncio.ensure_future(owner.call(lambda engine: engine.add(request(max_tokens=50))))
            await asyncio.sleep(0)
            adding.cancel()
            owner.post(lambda engine: engine.abort(A))
            holding.set()
            stats = await owner.call(lambda engine: engine.stats())
            assert held.is_set()
            assert stats.waiting_sequences == stats.running_sequences == 0
            with pytest.raises(asyncio.CancelledError):
                await adding

    asyncio.run(main())


def test_an_idle_engine_does_not_spin() -> None:
    class Counting(LocalEngine[ToyLogits]):
        looks = 0

        @property
        def has_work(self) -> bool:
            type(self).looks += 1
            return super().has_work

    async def main() -> None:
        toy, heard = ToyEngine(), Heard()
        toy.engine.__class__ = Counting
        async with engine_thread(heard, toy) as owner:
            await owner.call(lambda engine: engine.add(request()))
            await heard.until(lambda: len(heard.tokens()) == 4)
            for _ in range(3):
                await owner.call(lambda _: None)
            assert Counting.looks < 40

    asyncio.run(main())


def test_the_engine_waits_for_a_loop_that_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "RESULTS_MAX", 3)

    async def main() -> None:
        toy, heard = ToyEngine(), Heard()
        async with engine_thread(heard, toy) as owner:
            stepped = threading.Semaphore(0)
            original = toy.engine.step
            toy.engine.step = lambda: (original(), stepped.release())[0]  # type: ignore[method-assign]
            owner.post(lambda engine: engine.add(request(max_tokens=20)))
            for _ in range(3):
                assert stepped.acquire(timeout=WAIT_S), "blocks the loop until the engine has made its results"
            assert not stepped.acquire(timeout=0.05), "a fourth step was made though nobody took the results"
            await heard.until(lambda: len(heard.tokens()) == 20)

    asyncio.run(main())


def test_commands_are_bounded_and_letting_go_has_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "CALLS_MAX", 2)
    monkeypatch.setattr(thread, "COMMANDS_MAX", 4)

    async def main() -> None:
        async with engine_thread(Heard()) as owner:
            holding, held = threading.Event(), threading.Event()
            owner.post(lambda _: (held.set(), holding.wait(WAIT_S)))
            assert held.wait(WAIT_S)
            owner.post(lambda _: None)
            owner.post(lambda _: None)
            with pytest.raises(Overloaded):
                await owner.call(lambda _: None)
            owner.post(lambda _: None)
            owner.post(lambda _: None)
            with pytest.raises(Overloaded):
                owner.post(lambda _: None)
            holding.set()

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_reported() -> None:
    def factory() -> LocalEngine[ToyLogits]:
        raise UnsupportedModel("No.")

    async def main() -> None:
        owner = EngineThread(factory, Heard(), asyncio.get_running_loop())
        with pytest.raises(UnsupportedModel):
            await owner.started()
        with pytest.raises(Unavailable):
            await owner.call(lambda _: None)
        owner.post(lambda _: None)
        await owner.stop()
        assert not owner._thread.is_alive()

    asyncio.run(main())


def test_a_failing_engine_is_reported_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    def step() -> StepResult:
        raise ArithmeticError

    async def main() -> None:
        toy = ToyEngine()
        toy.engine.step = step  # type: ignore[method-assign]
        async with engine_thread(Heard(), toy) as owner:
            watching = asyncio.ensure_future(owner.ended())
            await owner.call(lambda engine: engine.add(request()))
            with pytest.raises(ArithmeticError):
                await watching
            with pytest.raises(Unavailable):
                await owner.call(lambda engine: engine.add(request("b")))
        assert toy.region.is_closed

    asyncio.run(main())
    assert any(record.levelname == "CRITICAL" for record in caplog.records)


def test_stopping_refuses_the_calls_that_wait() -> None:
    async def main() -> None:
        async with engine_thread(Heard()) as owner:
            holding = threading.Event()
            owner.post(lambda _: holding.wait(WAIT_S))
            calls = [asyncio.ensure_future(owner.call(lambda _: None)) for _ in range(3)]
            await asyncio.sleep(0)
            owner.request_stop()
            holding.set()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(outcome is None or isinstance(outcome, Unavailable) for outcome in outcomes)
            with pytest.raises(Unavailable):
                await owner.call(lambda _: None)
            await owner.ended()
            await owner.stop()

    asyncio.run(main())


def test_stop_in_the_middle_of_work_lets_go_of_the_region() -> None:
    async def main() -> None:
        toy, heard = ToyEngine(), Heard()
        async with engine_thread(heard, toy) as owner:
            await owner.call(lambda engine: engine.add(request(max_tokens=50)))
            await heard.until(lambda: len(heard.tokens()) > 1)
        assert toy.region.is_closed

    asyncio.run(main())


def test_the_thread_ends_when_its_loop_is_closed() -> None:
    async def main() -> tuple[ToyThread, ToyEngine]:
        toy = ToyEngine()
        owner = EngineThread(lambda: toy.engine, lambda _: None, asyncio.get_running_loop())
        await owner.started()
        owner.post(lambda engine: engine.add(request(max_tokens=50)))
        return owner, toy

    owner, toy = asyncio.run(main())
    owner.request_stop()
    assert owner.join(WAIT_S)
    assert toy.region.is_closed


def test_a_failing_receiver_does_not_block_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "RESULTS_MAX", 1)

    async def main() -> None:
        told: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

        def fails(_: StepResult) -> None:
            raise ArithmeticError

        async with engine_thread(fails) as owner:
            await owner.call(lambda engine: engine.add(request()))
            async with asyncio.timeout(WAIT_S):
                while owner.stats().steps < 4:
                    await owner.call(lambda _: None)
        assert told

    asyncio.run(main())


# ---- what happens outside of the thread


async def _restored_through_a_thread(*, is_told: bool) -> tuple[list[int], FakeTiers]:
    """Of a request whose prompt lies below the pool: its restore ends when another thread says so, or never."""
    toy = ToyEngine(blocks=12, tiers=lambda region: FakeTiers(ToyRows(region)))
    tiers = toy.engine.tiers
    assert isinstance(tiers, FakeTiers)
    prompt = tuple(range(1, 22))
    toy.add("first", prompt)
    toy.run()
    toy.add("filler", range(1, 46), salt="x", max_tokens=1)
    toy.run()
    tiers.at_once = False
    heard = Heard()
    async with engine_thread(heard, toy) as owner:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        await owner.call(lambda engine: engine.add(EngineRequest(A, prompt, params, Prefill.HERE)))
        await heard.until(lambda: any(result.admitted for result in heard.results))
        if is_told:
            await asyncio.to_thread(tiers.restores[-1].finish)
        await heard.until(lambda: len(heard.tokens()) == 4)
    return heard.tokens(), tiers


def test_a_wake_up_from_another_thread_is_heard() -> None:
    tokens, tiers = asyncio.run(_restored_through_a_thread(is_told=True))
    assert tokens == toy_reference(range(1, 22), SamplingParams(max_tokens=4, ignore_eos=True), 48)
    assert tiers.restores[-1].result is not None and tiers.restores[-1].result.good == 5


def test_who_waits_in_vain_is_looked_after_without_a_wake_up() -> None:
    tokens, tiers = asyncio.run(_restored_through_a_thread(is_told=False))
    assert tokens == toy_reference(range(1, 22), SamplingParams(max_tokens=4, ignore_eos=True), 48)
    assert tiers.restores[-1].result is not None and tiers.restores[-1].result.good == 0
