"""Host memory cut into rows that can be copied to and from the pool, and read and written by direct I/O."""

import contextlib
import mmap
from collections.abc import Callable

import numpy as np

from kvcache.tiers.interface import Rows
from kvcache.tiers.pages import whole_pages


class HostMemory:
    """Owns `slots` rows, each starting on a page. They are zero, and not resident, until touched."""

    def __init__(self, slots: int, row_bytes: int, pin: Callable[[memoryview], None] | None = None) -> None:
        """`pin` is given all of the memory, to lock its pages for a device; they are resident then. Raises OSError
        where there is no room in the address space, and what `pin` raises."""
        assert slots > 0 and row_bytes > 0
        self.slots, self.row_bytes, self.stride = slots, row_bytes, whole_pages(row_bytes)
        self._map = mmap.mmap(-1, slots * self.stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower to fill the first time, no more
            self._map.madvise(mmap.MADV_HUGEPAGE)
        if pin is not None:
            pin(memoryview(self._map))
        self._rows = np.frombuffer(self._map, np.uint8).reshape(slots, self.stride)[:, :row_bytes]

    @property
    def rows(self) -> Rows:
        """[slot][byte of the row]; from row to row it is `stride` bytes, a multiple of the page. What lies between
        the rows belongs to the row before."""
        return self._rows

    @property
    def size_bytes(self) -> int:
        """What it takes when all of it has been touched."""
        return self.slots * self.stride

    def close(self) -> None:
        """Views of the rows may outlive it: the memory goes with the last of them. Idempotent."""
        self._rows = np.empty((0, self.row_bytes), np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()
