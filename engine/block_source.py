"""The blocks that an engine's prefix cache has for other workers, as kvtransfer/fetch asks for them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from baton.ids import BlockHash
from engine.interface import Engine, Held
from engine.thread import EngineThread

E = TypeVar("E", bound=Engine)


class CachedBlocks:
    """Implements kvtransfer.fetch.source.BlockSource over the engine on its thread."""

    def __init__(self, thread: EngineThread[E]) -> None:
        self._call, self._post = thread.call, thread.post

    @asynccontextmanager
    async def hold(self, names: Sequence[BlockHash]) -> AsyncIterator[Held]:
        """Raises Overloaded if too much waits for the engine, Unavailable if it is gone."""
        holding = asyncio.ensure_future(self._call(lambda engine: engine.hold(names)))
        try:
            held = await asyncio.shield(holding)
        except asyncio.CancelledError:  # the engine may hold them all the same, now or soon
            holding.add_done_callback(self._let_go_of)
            raise
        try:
            yield held
        finally:
            self._let_go(held)

    def _let_go_of(self, holding: "asyncio.Future[Held]") -> None:
        if not holding.cancelled() and holding.exception() is None:
            self._let_go(holding.result())

    def _let_go(self, held: Held) -> None:
        self._post(partial(_let_go, held=held))


def _let_go(engine: Engine, held: Held) -> None:
    engine.let_go(held)
