"""The one thread that owns an engine, and how the asyncio loop speaks with it."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Generic, TypeVar

from baton.errors import Overloaded, Unavailable
from engine.interface import Engine, EngineStats, ModelInfo, StepResult
from kvtransfer.interface import Region

log = logging.getLogger(__name__)

CALLS_MAX = 4096
"""Commands that may wait for the thread before `call` refuses."""
COMMANDS_MAX = 2 * CALLS_MAX
"""The same for `post`: what lets go of blocks is not turned away because of what asks for them."""
RESULTS_MAX = 32
"""Step results that the loop has not taken in yet; at so many the engine waits."""

E = TypeVar("E", bound=Engine)
T = TypeVar("T")
Reply = Callable[[], None]
"""What remains to be done on the loop once a command has run."""
Command = Callable[[E | None], Reply]
"""Runs on the engine's thread; without an engine when that is gone."""


class EngineThread(Generic[E]):
    """Runs `engine_factory`, and then the engine it made, on a thread of its own until `stop`.

    The thread starts at once; every method is for the loop's thread. `on_result` is called on the loop, in
    order, with each step's result that says something. When the loop falls behind, the engine waits for it.
    """

    def __init__(
        self, engine_factory: Callable[[], E], on_result: Callable[[StepResult], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._factory, self._on_result, self._loop = engine_factory, on_result, loop
        self._changed = threading.Condition()
        """Guards the three below; notified whenever the thread may have something to do."""
        self._commands: deque[Command[E]] = deque()
        self._results_out = 0
        self._is_stopping = False
        self._started, self._ended = asyncio.Event(), asyncio.Event()
        self._error: Exception | None = None
        self._stats = EngineStats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- on the loop

    async def started(self) -> ModelInfo:
        """Returns when the engine is made; raises what the factory raised."""
        await self._started.wait()
        if self._error is not None:
            raise self._error
        return self.model

    async def ended(self) -> None:
        """Returns when `stop` has ended the thread; raises the error if it was one that ended it."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    @property
    def model(self) -> ModelInfo:
        """After `started`."""
        return self._model

    @property
    def region(self) -> Region:
        """After `started`; the engine closes it when the thread ends."""
        return self._region

    def stats(self) -> EngineStats:
        """As of the last step or command; never waits."""
        return self._stats

    async def call(self, command: Callable[[E], T]) -> T:
        """Runs the command on the thread, between two steps; returns or raises what it does.

        Raises Overloaded if too many commands wait, Unavailable if the engine is gone. If the caller is
        cancelled the command may run all the same, before whatever is posted afterwards.
        """
        outcome: asyncio.Future[T] = self._loop.create_future()
        if not self._enqueue(_answering(outcome, command), CALLS_MAX):
            raise Unavailable("The engine of this worker has ended.")
        return await outcome

    def post(self, command: Callable[[E], object]) -> None:
        """Runs the command on the thread, after those before it, and waits for nothing; an error is logged.
        Once the engine is gone nothing is left to do. Raises Overloaded if too many commands wait."""
        self._enqueue(_unanswered(command), COMMANDS_MAX)

    def _enqueue(self, command: Command[E], commands_max: int) -> bool:
        """Whether the thread will see it."""
        with self._changed:
            if self._is_stopping:
                return False
            if len(self._commands) >= commands_max:
                raise Overloaded(f"{len(self._commands)} commands wait for the engine already; try again later.")
            self._commands.append(command)
            self._changed.notify()
        return True

    async def stop(self) -> None:
        """Ends the thread after the step it is in, closes the engine and joins. Idempotent."""
        self.request_stop()
        await self._ended.wait()
        self._thread.join()

    def _wake(self) -> None:
        """The engine may have work; from any thread."""
        with self._changed:
            self._changed.notify()

    def request_stop(self) -> None:
        """Makes the thread end by itself; from any thread, also when the loop runs no more."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Waits, blocking, for the end that `request_stop` asked for; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _take_in(self, result: StepResult) -> None:
        try:
            self._on_result(result)
        finally:
            with self._changed:
                self._results_out -= 1
                self._changed.notify()

    # ---- on the engine's thread

    def _run(self) -> None:
        try:
            engine = self._factory()
        except Exception as error:
            self._error = error
        else:
            self._model, self._region, self._stats = engine.model, engine.region, engine.stats()
            engine.set_wake(self._wake)
            self._tell(self._started.set)
            self._serve_and_close(engine)
        self.request_stop()
        self._run_commands(None)
        self._tell(self._started.set, self._ended.set)

    def _serve_and_close(self, engine: E) -> None:
        try:
            try:
                self._serve(engine)
            finally:
                engine.close()
        except Exception as error:
            log.critical("The engine failed and ends", exc_info=True)
            self._error = error

    def _serve(self, engine: E) -> None:
        while self._wait_for_work(engine):
            self._run_commands(engine)
            if self._may_step(engine):
                self._step(engine)

    def _wait_for_work(self, engine: E) -> bool:
        """False: the thread is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_stopping or self._commands or self._may_step(engine), engine.patience_s
            )
            return not self._is_stopping

    def _may_step(self, engine: E) -> bool:
        return self._results_out < RESULTS_MAX and engine.has_work

    def _run_commands(self, engine: E | None) -> None:
        """Runs what waits by now, answering when the statistics know of it."""
        with self._changed:
            commands = tuple(self._commands)
            self._commands.clear()
        replies = [command(engine) for command in commands]
        if engine is not None:
            self._stats = engine.stats()
        if replies:
            self._tell(*replies)

    def _step(self, engine: E) -> None:
        result = engine.step()
        self._stats = engine.stats()
        if result:
            with self._changed:
                self._results_out += 1
            self._tell(lambda: self._take_in(result))

    def _tell(self, *actions: Callable[[], None]) -> None:
        """Runs them on the loop. When that is closed nobody listens any more, so the thread ends."""
        try:
            self._loop.call_soon_threadsafe(_do_all, actions)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self.request_stop()


def _do_all(actions: Iterable[Callable[[], None]]) -> None:
    for action in actions:
        action()


def _answering(outcome: "asyncio.Future[T]", command: Callable[[E], T]) -> Command[E]:
    def run(engine: E | None) -> Reply:
        if engine is None:
            return partial(_raise, outcome, Unavailable("The engine of this worker has ended."))
        try:
            result = command(engine)
        except Exception as error:
            return partial(_raise, outcome, error)
        return partial(_return, outcome, result)

    return run


def _raise(outcome: "asyncio.Future[T]", error: Exception) -> None:
    if not outcome.done():
        outcome.set_exception(error)


def _return(outcome: "asyncio.Future[T]", result: T) -> None:
    if not outcome.done():
        outcome.set_result(result)


def _unanswered(command: Callable[[E], object]) -> Command[E]:
    def run(engine: E | None) -> Reply:
        if engine is not None:
            try:
                command(engine)
            except Exception:
                log.exception("A command to the engine failed")
        return _nothing

    return run


def _nothing() -> None:
    pass
