"""Takes something from an engine that has to be given back, however the taker ends."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from engine.interface import Engine
from engine.thread import EngineThread

E = TypeVar("E", bound=Engine)
T = TypeVar("T")


async def acquire(thread: EngineThread[E], take: Callable[[E], T], give_back: Callable[[E, T], object]) -> T:
    """What `take` returns is the caller's to give back. If the caller is cancelled before it has it, the engine may
    take it all the same, now or soon: then it is given back here. Raises as EngineThread.call does."""
    taking = asyncio.ensure_future(thread.call(take))

    def undo(taking: "asyncio.Future[T]") -> None:
        if not taking.cancelled() and taking.exception() is None:
            taken = taking.result()
            thread.post(lambda engine: give_back(engine, taken))

    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(undo)
        raise
