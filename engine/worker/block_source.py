"""The blocks that an engine's cache has for other workers, as kvtransfer/fetch asks for them."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Generic, TypeVar

from baton.ids import BlockHash
from engine.interface import Engine, Held
from engine.thread import EngineThread
from engine.worker.acquire import acquire

E = TypeVar("E", bound=Engine)
Promotion = asyncio.Future[None]


class CachedBlocks(Generic[E]):
    """Implements kvtransfer.fetch.source.BlockSource over the engine on its thread: what lies in lower tiers is brought
    up first. Lives on the loop."""

    def __init__(self, thread: EngineThread[E]) -> None:
        self._thread = thread
        self._promoting: dict[BlockHash, Promotion] = {}
        """By what was asked for: who asks for the same meanwhile waits for the same."""

    @asynccontextmanager
    async def hold(self, names: Sequence[BlockHash]) -> AsyncIterator[Held]:
        """Waits as long as it takes to bring them up, which the caller bounds. Raises Overloaded if too much waits for
        the engine, Unavailable if it is gone."""
        held = await self._hold(names)
        try:
            yield held
        finally:
            self._thread.post(partial(_let_go, held=held))

    async def _hold(self, names: Sequence[BlockHash]) -> Held:
        if under_way := {self._promoting[name] for name in names if name in self._promoting}:
            await asyncio.wait(under_way)
        promotion = self._begin(names)
        try:
            held = await acquire(self._thread, partial(_hold_or_promote, names=names, promotion=promotion), _let_go)
        except Exception:
            _end(promotion)
            raise
        if held is None:
            await asyncio.wait({promotion})
            held = await acquire(self._thread, lambda engine: engine.hold(names), _let_go)
        return held

    def _begin(self, names: Iterable[BlockHash]) -> Promotion:
        promotion: Promotion = asyncio.get_running_loop().create_future()
        own = [name for name in dict.fromkeys(names) if name not in self._promoting]
        self._promoting.update(dict.fromkeys(own, promotion))
        promotion.add_done_callback(lambda _: self._forget(own))
        return promotion

    def _forget(self, names: Iterable[BlockHash]) -> None:
        for name in names:
            del self._promoting[name]


def _hold_or_promote(engine: Engine, names: Sequence[BlockHash], promotion: Promotion) -> Held | None:
    """On the engine's thread. None: to be held when the promotion has ended."""
    if engine.promote(names, partial(_tell, promotion)):
        return None
    _tell(promotion)
    return engine.hold(names)


def _tell(promotion: Promotion) -> None:
    """On the engine's thread, that it has ended. When the loop is closed nobody waits for it any more."""
    loop = promotion.get_loop()
    try:
        loop.call_soon_threadsafe(_end, promotion)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _end(promotion: Promotion) -> None:
    if not promotion.done():
        promotion.set_result(None)


def _let_go(engine: Engine, held: Held | None) -> None:
    if held is not None:
        engine.let_go(held)
