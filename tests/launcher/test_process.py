import asyncio
import os
import signal

import pytest

from baton.errors import Unavailable
from launcher.process import StopSignals, run_service, run_until_stopped, serve, unless


class Recorder:
    """A service that writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.start_blocks = self.drain_blocks = False
        self.reached = asyncio.Event()
        self.failure: Exception | None = None

    async def start(self) -> None:
        self.calls.append("start")
        if self.start_blocks:
            self.reached.set()
            await asyncio.Event().wait()

    async def failed(self) -> None:
        if self.failure:
            raise self.failure
        await asyncio.Event().wait()

    async def drain(self) -> None:
        self.calls.append("drain")
        if self.drain_blocks:
            self.reached.set()
            await asyncio.Event().wait()

    async def stop(self) -> None:
        self.calls.append("stop")


async def nothing(_: Recorder) -> str:
    return "done"


def test_a_service_starts_acts_drains_and_stops() -> None:
    service = Recorder()
    assert run_service(service, nothing, drain_timeout_s=1) == "done"
    assert service.calls == ["start", "drain", "stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_it_does(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    service = Recorder()

    def ready_line(_: Recorder) -> str:
        os.kill(os.getpid(), number)
        return "ready"

    run_until_stopped(service, ready_line, drain_timeout_s=1)
    assert service.calls == ["start", "drain", "stop"]
    assert capsys.readouterr().out == "ready\n"


def test_a_failure_ends_it_and_is_told() -> None:
    service = Recorder()
    service.failure = Unavailable("The engine has ended.")
    with pytest.raises(Unavailable, match="has ended"):
        run_until_stopped(service, lambda _: "ready", drain_timeout_s=1)
    assert service.calls == ["start", "stop"]


def test_a_signal_while_it_starts_stops_it_without_a_drain() -> None:
    async def test() -> None:
        service, signals = Recorder(), StopSignals()
        service.start_blocks = True
        serving = asyncio.create_task(serve(service, nothing, 1, signals))
        await service.reached.wait()
        signals.came()
        assert await serving is None
        assert service.calls == ["start", "stop"]

    asyncio.run(test())


def test_a_second_signal_cuts_the_drain_short() -> None:
    async def test() -> None:
        service, signals = Recorder(), StopSignals()
        service.drain_blocks = True
        serving = asyncio.create_task(serve(service, nothing, 60, signals))
        await service.reached.wait()
        signals.came()
        assert not serving.done()
        signals.came()
        await serving
        assert service.calls == ["start", "drain", "stop"]

    asyncio.run(test())


def test_a_drain_that_takes_too_long_is_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    service = Recorder()
    service.drain_blocks = True
    assert run_service(service, nothing, drain_timeout_s=0.01) == "done"
    assert service.calls == ["start", "drain", "stop"]
    assert "0.01 s of draining" in caplog.text


def test_what_fails_is_raised_after_stopping() -> None:
    async def fail(_: Recorder) -> None:
        raise KeyError("it")

    service = Recorder()
    with pytest.raises(KeyError):
        run_service(service, fail, drain_timeout_s=1)
    assert service.calls == ["start", "stop"]


def test_unless_gives_the_result_when_nobody_asks() -> None:
    async def test() -> None:
        assert await unless(asyncio.Event(), asyncio.sleep(0, "result")) == "result"

    asyncio.run(test())
