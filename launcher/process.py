"""Runs one service in the foreground: start, act until done or told to stop, drain, stop."""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from baton.process import freeze_heap, raise_descriptor_limit

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)
Result = TypeVar("Result")
AnyService = TypeVar("AnyService", bound="Service")


class Service(Protocol):
    async def start(self) -> None:
        """Returns when it serves. Whether it fails or is cancelled, `stop` still cleans up."""

    async def failed(self) -> None:
        """Raises when the service cannot go on, and its process should end; does not return before `stop`."""

    async def drain(self) -> None:
        """Takes nothing new and returns when what runs has finished."""

    async def stop(self) -> None:
        """Idempotent, and right at any point of a start."""


class Stopped(Exception):
    """A signal asked the process to end while it waited for something else."""


class StopSignals:
    """SIGINT and SIGTERM alike: the first asks to finish what runs, the second to end at once."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()

    def came(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    @contextmanager
    def handled(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.came)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)


def run_until_stopped(service: AnyService, ready_line: Callable[[AnyService], str], drain_timeout_s: float) -> None:
    """Serves until a signal; prints the line on stdout once it does."""
    stdout = sys.stdout  # as it is now: while Ray runs it is another

    async def act(service: AnyService) -> None:
        print(ready_line(service), file=stdout, flush=True)
        await service.failed()

    run_service(service, act, drain_timeout_s)


def run_service(
    service: AnyService, act: Callable[[AnyService], Awaitable[Result]], drain_timeout_s: float
) -> Result | None:
    """Starts the service, acts, drains and stops it; returns what the act did, or None if a signal ended it.

    A second signal cuts the drain short. Raises what start and act raise, after stopping.
    """
    import uvloop

    return uvloop.run(serve(service, act, drain_timeout_s))


async def serve(
    service: AnyService,
    act: Callable[[AnyService], Awaitable[Result]],
    drain_timeout_s: float,
    signals: StopSignals | None = None,
) -> Result | None:
    """`run_service` on a loop that runs already; `signals` may come from elsewhere too."""
    raise_descriptor_limit()
    signals = signals or StopSignals()
    with signals.handled():
        try:
            result = await start_and_act(service, act, signals.first)
            await drain(service, drain_timeout_s, signals.second)
        except Stopped:
            result = None
        finally:
            await stop(service)
    return result


async def start_and_act(
    service: AnyService, act: Callable[[AnyService], Awaitable[Result]], stop_asked: asyncio.Event
) -> Result | None:
    """Raises Stopped if asked before the service serves; returns None if asked while acting."""
    await unless(stop_asked, service.start())
    freeze_heap()
    try:
        return await unless(stop_asked, act(service))
    except Stopped:
        return None


async def drain(service: Service, timeout_s: float, stop_asked: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await unless(stop_asked, service.drain())
    except TimeoutError:
        log.warning("not everything had finished within %g s of draining", timeout_s)


async def stop(service: Service) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await service.stop()
    except TimeoutError:
        log.error("the service did not stop within %g s; leaving it", STOP_TIMEOUT_S)


async def unless(asked: asyncio.Event, work: Awaitable[Result]) -> Result:
    """The work's result. Raises Stopped, with the work cancelled and gone, when asked first."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Stopped
        return task.result()
    finally:
        for one in (task, waiting):
            one.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
