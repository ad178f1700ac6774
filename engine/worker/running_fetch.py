"""A fetch that is under way, and the requests that wait for it."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from baton.clock import Clock
from baton.ids import BlockHash
from engine.worker.patience import Patience
from kvtransfer.landing import Landing


class RunningFetch:
    """Goes on without them, and sees to its blocks by itself. It is taken back when the last that waited is gone, and
    when one that waits for all of it has no patience any more: those that came later would soon have none either, and
    only what has ended can be used."""

    def __init__(
        self,
        names: Sequence[BlockHash],
        work: Callable[["RunningFetch"], Coroutine[object, object, int]],
        clock: Clock,
    ) -> None:
        """`work` fills `landing`, ends soon after `taken_back` is set, and returns how many of the blocks came."""
        self.names, self._clock = names, clock
        self.landing = Landing(len(names))
        self.taken_back = asyncio.Event()
        self.is_late = False
        """It was taken back because somebody had no patience any more."""
        self._waiting = 0
        self.task = asyncio.create_task(work(self))

    async def blocks(self, names: Sequence[BlockHash], patience: Patience, cancelled: asyncio.Event) -> int:
        """How many of `names`, from the first on, it brought; none if it does not end in time, and none at once when
        `cancelled` is set."""
        wanted, is_late = self.in_common(names), False
        is_whole = wanted == len(self.names)
        leaving = asyncio.ensure_future(cancelled.wait())
        self._waiting += 1
        try:
            is_late = await self._is_late(leaving, patience, is_whole)
        finally:
            leaving.cancel()
            self._waiting -= 1
            if not self._waiting or (is_late and is_whole):
                self._take_back(is_late)
        if is_late and self.taken_back.is_set():
            await asyncio.wait({self.task}, timeout=patience.release_s)
        if not self.task.done() or self.task.cancelled():
            return 0
        return min(self.task.result(), wanted)

    def _take_back(self, is_late: bool) -> None:
        if not (self.taken_back.is_set() or self.task.done()):
            self.is_late = is_late
            self.taken_back.set()

    async def _is_late(self, leaving: asyncio.Future[Any], patience: Patience, is_whole: bool) -> bool:
        """Returns when there is nothing to wait for any more. At most one round for each block that lands; these count
        for nothing to one that waits for a part, which will not have them before all of it has ended."""
        began_s = self._clock()
        while not (self.task.done() or leaving.done()):
            landed = self.landing.leading if is_whole else 0
            left_s = patience.fetch_s(landed) - (self._clock() - began_s)
            if left_s <= 0:
                return True
            await asyncio.wait({self.task, leaving}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        return False

    def in_common(self, names: Sequence[BlockHash]) -> int:
        """How many of `names`, from the first on, it is to bring."""
        differs = (index for index, (a, b) in enumerate(zip(self.names, names, strict=False)) if a != b)
        return next(differs, min(len(self.names), len(names)))
