"""Tells on stderr what takes so long."""

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TextIO

FIRST_S = 1.0
"""What is over sooner is not worth a line."""
PERIOD_S = 5.0
"""Between lines that stay; on a terminal one line is rewritten every second instead."""


class Progress:
    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    @asynccontextmanager
    async def step(self, doing: str) -> AsyncIterator[None]:
        """While the body runs: `doing ... 3 s`, from the first second on."""
        ticking = asyncio.create_task(self._tick(doing))
        try:
            yield
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            self._end()

    async def _tick(self, doing: str) -> None:
        period_s = 1.0 if self._stream.isatty() else PERIOD_S
        await asyncio.sleep(FIRST_S)
        for elapsed_s in itertools.count(FIRST_S, period_s):
            self._show(f"{doing} ... {elapsed_s:.0f} s")
            await asyncio.sleep(period_s)

    def _show(self, line: str) -> None:
        start, end = ("\r\x1b[K", "") if self._stream.isatty() else ("", "\n")
        print(f"{start}{line}", end=end, file=self._stream, flush=True)

    def _end(self) -> None:
        """Leaves a terminal's line as if nothing had been written."""
        if self._stream.isatty():
            print("\r\x1b[K", end="", file=self._stream, flush=True)
