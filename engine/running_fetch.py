"""A fetch that is under way, and the requests that wait for it."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from baton.ids import BlockHash


class RunningFetch:
    """Goes on without them: it is taken back when the last that waited has no use for it any more, and sees to its
    blocks by itself."""

    def __init__(
        self, names: Sequence[BlockHash], work: Callable[[asyncio.Event], Coroutine[object, object, int]]
    ) -> None:
        """`work` is given what is set when it is taken back, and returns how many of the blocks came."""
        self.names = names
        self._taken_back = asyncio.Event()
        self._waiting = 0
        self.task = asyncio.create_task(work(self._taken_back))

    async def blocks(self, names: Sequence[BlockHash], within_s: float, cancelled: asyncio.Event) -> int:
        """How many of `names`, from the first on, it brought; none if it does not end in time."""
        self._waiting += 1
        leaving, is_late = asyncio.ensure_future(cancelled.wait()), False
        try:
            ended, _ = await asyncio.wait({self.task, leaving}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            is_late = not ended  # then its own deadline has passed, too
        finally:
            leaving.cancel()
            self._waiting -= 1
            if not (self._waiting or is_late):
                self._taken_back.set()
        if not self.task.done() or self.task.cancelled():
            return 0
        return min(self.task.result(), self.in_common(names))

    def in_common(self, names: Sequence[BlockHash]) -> int:
        """How many of `names`, from the first on, it is to bring."""
        differs = (index for index, (a, b) in enumerate(zip(self.names, names, strict=False)) if a != b)
        return next(differs, min(len(self.names), len(names)))
