"""How fast a link should be."""

import asyncio
from collections.abc import Callable
from time import perf_counter

import numpy as np

from baton.layout import KVLayout
from kvtransfer.link.probe import Measured, bulk_write_bytes

MEMORY_SHARE_MIN = {"inproc": 0.1, "shm": 0.25, "nixl": 0.1}
"""Of a copy within this process's memory, what a link within one machine should reach at least. Networks are not judged
by it: what they can do only the operator knows (`link_bytes_per_s_min`)."""
MACHINE_LATENCY_S = 0.001
"""Beyond it a nixl link leads to another machine, so it is not judged by this one's memory."""
WRITE_OVERHEAD_S, SLICE_OVERHEAD_S = 0.0002, 5e-6
"""Granted to each write besides, and to each slice of it, which count where blocks are small."""
COPY_BYTES = 32 * 2**20
"""More than what stays in a processor's cache, as a pool of blocks is."""
COPIES = 3


class Expectations:
    """This worker's. The memory is measured when it is first asked for, which takes 50 ms or so, in a thread."""

    def __init__(self, bytes_per_s_min: float = 0.0, memory: Callable[[], float] | None = None) -> None:
        self._bytes_per_s_min, self._measure_memory = bytes_per_s_min, memory or measure_memory
        self._memory_bytes_per_s: float | None = None

    async def bytes_per_s_min(self, transport: str, measured: Measured, layout: KVLayout) -> float:
        """What that link should reach when it was tested with blocks of this layout; 0: nothing is known."""
        if self._bytes_per_s_min:
            return self._bytes_per_s_min
        if transport not in MEMORY_SHARE_MIN or (transport == "nixl" and measured.latency_s > MACHINE_LATENCY_S):
            return 0.0
        if self._memory_bytes_per_s is None:
            self._memory_bytes_per_s = await asyncio.to_thread(self._measure_memory)
        write_bytes = bulk_write_bytes(layout)
        copied_s = write_bytes / (MEMORY_SHARE_MIN[transport] * self._memory_bytes_per_s)
        slices_s = write_bytes / layout.slice_bytes * SLICE_OVERHEAD_S
        return write_bytes / (copied_s + slices_s + WRITE_OVERHEAD_S)


def measure_memory() -> float:
    """Bytes per second of a copy in this process's memory."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    fastest_s = 1.0
    for _ in range(COPIES):
        started_s = perf_counter()
        np.copyto(target, source)
        fastest_s = min(fastest_s, max(perf_counter() - started_s, 1e-9))
    return COPY_BYTES / fastest_s
