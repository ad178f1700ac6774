import asyncio
import io

import pytest

from launcher import progress
from launcher.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, sleeps: int) -> str:
    """What a step writes that takes as many sleeps of the ticker, each of which is over at once."""
    sleep = asyncio.sleep
    slept, enough = [], asyncio.Event()

    async def no_sleep(delay_s: float) -> None:
        slept.append(delay_s)
        if len(slept) > sleeps:
            enough.set()
            await asyncio.Event().wait()
        await sleep(0)

    async def test() -> None:
        async with Progress(stream).step("loading"):
            await enough.wait()

    monkeypatch.setattr(progress.asyncio, "sleep", no_sleep)
    asyncio.run(test())
    return stream.getvalue()


def test_what_is_over_within_a_second_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps(io.StringIO(), monkeypatch, sleeps=0) == ""


def test_a_log_gets_a_line_after_a_second_and_then_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps(io.StringIO(), monkeypatch, sleeps=3) == "loading ... 1 s\nloading ... 6 s\nloading ... 11 s\n"


def test_a_terminal_has_one_line_that_changes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = steps(Terminal(), monkeypatch, sleeps=2)
    assert written == "\r\x1b[Kloading ... 1 s\r\x1b[Kloading ... 2 s\r\x1b[K"
