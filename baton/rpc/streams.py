"""Writing to a gRPC stream from several tasks."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")


class SerialWriter(Generic[Message]):
    """One write at a time, each carried through.

    gRPC fails a call on which a write starts before the last has ended, and a cancelled task would abandon
    its write half-way; so the task's cancellation waits until its write is done.
    """

    def __init__(self, write: Callable[[Message], Awaitable[None]]) -> None:
        self._write = write
        self._lock = asyncio.Lock()

    async def __call__(self, message: Message) -> None:
        async with self._lock:
            writing = asyncio.ensure_future(self._write(message))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait({writing})
                if not writing.cancelled():
                    writing.exception()  # whoever is cancelled does not want to know
                raise
