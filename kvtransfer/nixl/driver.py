"""The one thread that NIXL runs on: busy while something moves, asleep otherwise."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from baton.clock import monotonic
from baton.errors import TransferError
from kvtransfer.interface import Region
from kvtransfer.nixl.agent import Agent, Source
from kvtransfer.nixl.pace import Pace
from kvtransfer.nixl.pipeline import Ended, Pipeline, Read

T = TypeVar("T")
CLOSE_S = 1.0
"""What is under way when the driver closes has this long to end by itself; then the agent goes, and it with it."""


class Driver:
    """Both ends of a worker's nixl use one; it is brought up by the first and goes with the last.

    All methods run on the loop.
    """

    def __init__(self, region: Region, make_agent: Callable[[Region], Agent] = Agent) -> None:
        self._region, self._make_agent = region, make_agent
        self._users = 0
        self._starting = asyncio.Lock()
        self._thread: _Thread | None = None

    async def acquire(self) -> None:
        """To be released once. Raises TransferError if NIXL cannot be brought up on the region."""
        async with self._starting:
            if self._thread is None:
                thread = _Thread(lambda: self._make_agent(self._region))
                await thread.start()
                self._thread = thread
            self._users += 1

    async def release(self) -> None:
        async with self._starting:
            self._users -= 1
            if self._users == 0 and self._thread is not None:
                thread, self._thread = self._thread, None
                await thread.stop()

    @property
    def source(self) -> Source:
        """How others read this worker's region."""
        return self._up.agent_made.result().source

    async def call(self, work: Callable[[Agent], T]) -> T:
        """Runs it on the thread; a few milliseconds at most. Cancelled, it may run all the same."""
        return await self._up.call(work)

    def submit(self, work: Callable[[Agent], object]) -> None:
        """As `call`, for work that cannot fail and that nobody waits for."""
        if self._thread is not None:
            self._thread.submit(work)

    def read(self, read: Read) -> None:
        self._up.read(read)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """While others may be reading this worker's region: some links move nothing unless both ends look."""
        thread = self._up
        thread.attend(+1)
        try:
            yield
        finally:
            thread.attend(-1)

    @property
    def _up(self) -> "_Thread":
        if self._thread is None:
            raise TransferError("NIXL is closed here.")
        return self._thread


class _Thread:
    def __init__(self, make_agent: Callable[[], Agent]) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_agent = make_agent
        self.agent_made: asyncio.Future[Agent] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._pace = Pace(monotonic)
        self._attended = 0
        self._stops_at_s: float | None = None
        self._pipeline: Pipeline
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)

    # ---- on the loop

    async def start(self) -> None:
        """Raises what the making of the agent raises, which ends the thread; cancelled, it ends by itself as well."""
        self._thread.start()
        try:
            await asyncio.shield(self.agent_made)
        except asyncio.CancelledError:
            self._work.put(self._stop)
            raise

    async def stop(self) -> None:
        self._work.put(self._stop)
        await asyncio.shield(self._ended)
        self._thread.join()

    async def call(self, work: Callable[[Agent], T]) -> T:
        done: asyncio.Future[T] = self._loop.create_future()
        self.submit(lambda agent: self._answer(done, lambda: work(agent)))
        return await done

    def submit(self, work: Callable[[Agent], object]) -> None:
        agent = self.agent_made.result()
        self._work.put(lambda: work(agent))

    def read(self, read: Read) -> None:
        self._work.put(lambda: self._pipeline.add(read))

    def attend(self, change: int) -> None:
        self._work.put(lambda: self._change_attended(change))

    # ---- on the thread

    def _run(self) -> None:
        try:
            agent = self._make_agent()
        except TransferError as error:
            self._tell(_set_error, self.agent_made, error)
            return
        self._pipeline = Pipeline(agent)
        self._tell(_set_result, self.agent_made, agent)
        try:
            while not self._is_over():
                self._take_work()
                self._report(self._pipeline.advance())
                agent.progress()
        finally:
            left = self._pipeline.give_up()
            agent.close()
            self._report(left)
            self._tell(_set_result, self._ended, None)

    def _is_over(self) -> bool:
        if self._stops_at_s is None:
            return False
        return not self._pipeline.is_busy or monotonic() > self._stops_at_s

    def _take_work(self) -> None:
        sleep_s = self._pace.sleep_s(self._pipeline.is_busy, self._attended > 0 or self._stops_at_s is not None)
        try:
            work = self._work.get(timeout=sleep_s) if sleep_s else self._work.get_nowait()
            while True:
                self._pace.happened()
                work()
                work = self._work.get_nowait()
        except queue.Empty:
            pass

    def _report(self, ended: Sequence[Ended]) -> None:
        if ended:
            self._pace.happened()
            self._tell(_end, ended)

    def _stop(self) -> None:
        self._stops_at_s = monotonic() + CLOSE_S

    def _change_attended(self, change: int) -> None:
        self._attended += change

    def _answer(self, done: "asyncio.Future[T]", work: Callable[[], T]) -> None:
        try:
            result = work()
        except TransferError as error:
            self._tell(_set_error, done, error)
        else:
            self._tell(_set_result, done, result)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
            self._loop.call_soon_threadsafe(what, *arguments)


def _set_result(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: "asyncio.Future[T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _end(outcomes: Sequence[Ended]) -> None:
    for outcome in outcomes:
        if outcome.error is None:
            _set_result(outcome.read.ended, None)
        else:
            _set_error(outcome.read.ended, outcome.error)
