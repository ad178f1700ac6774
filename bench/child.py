"""A service in a process of its own, so that its CPU time is its own, with a pipe to ask it things."""

import asyncio
import cProfile
import multiprocessing
import pstats
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from baton.process import freeze_heap, raise_descriptor_limit

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0
Stats = Mapping[tuple[str, int, str], tuple[int, int, float, float, Mapping[Any, Any]]]
"""As in pstats: (file, line, function) -> (calls, primitive calls, own seconds, seconds, the same for each caller)."""


class Child:
    """The parent's end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.ready = self._answer(START_TIMEOUT_S)
        """What the service said of itself when it was up."""

    @property
    def cpu_s(self) -> float:
        """That its process has used so far, in all its threads."""
        return float(self._ask("cpu"))

    def start_profile(self) -> None:
        self._ask("start profile")

    def stop_profile(self) -> Stats:
        stats: Stats = self._ask("stop profile")
        return stats

    def stop(self) -> None:
        self._pipe.send("stop")

    def _ask(self, command: str) -> Any:
        self._pipe.send(command)
        return self._answer(ANSWER_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError("a process of the benchmark does not answer")
        return self._pipe.recv()


@contextmanager
def running(main: Callable[..., None], *arguments: Any) -> Iterator[Child]:
    """`main(pipe, *arguments)` in a new process until the context ends. It is to call `serve`; raises EOFError if it
    ends before it is up."""
    context = multiprocessing.get_context("spawn")  # a fork would take the parent's threads and loops with it
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        child = Child(ours)
        yield child
        child.stop()
        process.join(ANSWER_TIMEOUT_S)
    finally:
        process.kill()
        process.join()
        ours.close()


def serve(pipe: Connection, service: Callable[[], Any]) -> None:
    """The child's end: `service` is an async context manager that yields what to say when it is up."""
    raise_descriptor_limit()
    uvloop.run(_serve(pipe, asynccontextmanager(service)))


async def _serve(pipe: Connection, service: Callable[[], Any]) -> None:
    async with service() as ready:
        freeze_heap()
        pipe.send(ready)
        async for command in _commands(pipe):
            match command:
                case "cpu":
                    pipe.send(time.process_time())
                case "start profile":
                    profile = cProfile.Profile()
                    pipe.send(None)
                    profile.enable()
                case "stop profile":
                    profile.disable()
                    pipe.send(pstats.Stats(profile).stats)  # type: ignore[attr-defined]


async def _commands(pipe: Connection) -> AsyncIterator[str]:
    """Until the parent says stop, or is gone."""
    while True:
        try:
            command = await asyncio.to_thread(pipe.recv)
        except EOFError:
            return
        if command == "stop":
            return
        yield command
