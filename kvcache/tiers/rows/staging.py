"""Rows of host memory that a thread uses for a moment: for what was read from the disk, or is not compressed yet."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvcache.tiers.interface import Rows
from kvcache.tiers.rows.host_memory import HostMemory


class Staging:
    """A few equal arenas; resident once used."""

    def __init__(
        self, arenas: int, row_bytes: int, arena_bytes: int, pin: Callable[[memoryview], None] | None = None
    ) -> None:
        """Each has one row at least."""
        self.slots = max(1, arena_bytes // row_bytes)
        self._lock = threading.Lock()
        self._memories = [HostMemory(self.slots, row_bytes, pin) for _ in range(arenas)]
        self._free = [memory.rows for memory in self._memories]

    @contextmanager
    def taken(self) -> Iterator[Rows]:
        """The caller's until the end of the block. There are as many as can be in use at one time."""
        with self._lock:
            rows = self._free.pop()
        try:
            yield rows
        finally:
            with self._lock:
                self._free.append(rows)

    def close(self) -> None:
        """Nobody uses one any more."""
        self._free.clear()
        for memory in self._memories:
            memory.close()
