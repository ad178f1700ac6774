"""What the machine itself can do: one memcpy, and the sequential read of a file on the disk of the SSD tier."""

import mmap
import os
import time
from pathlib import Path
from statistics import median

import numpy as np

READ_BYTES = 8 * 2**20
"""In one call: more gains nothing on the disks that this was tried on."""
REPEATS = 7


def memcpy_gb_per_s(size_bytes: int) -> float:
    """Between two buffers of that size, which have been touched."""
    source, target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
    seconds = []
    for _ in range(REPEATS + 1):
        began_s = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began_s)
    return size_bytes / median(seconds[1:]) / 1e9


def disk_read_gb_per_s(directory: Path, size_bytes: int) -> tuple[float, bool]:
    """Of a file that is made there and deleted again, and whether it was read past the page cache."""
    size_bytes -= size_bytes % READ_BYTES
    path = directory / f"raw-read-{os.getpid()}"
    buffer = mmap.mmap(-1, READ_BYTES)
    buffer.write(os.urandom(READ_BYTES))
    try:
        descriptor, is_direct = _open(path)
        try:
            for offset in range(0, size_bytes, READ_BYTES):
                os.pwritev(descriptor, [buffer], offset)
            os.fsync(descriptor)
            rates = [_read(descriptor, buffer, size_bytes) for _ in range(REPEATS)]
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
        buffer.close()
    return median(rates), is_direct


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError:
        return os.open(path, flags & ~os.O_EXCL, 0o600), False


def _read(descriptor: int, buffer: mmap.mmap, size_bytes: int) -> float:
    began_s = time.perf_counter()
    for offset in range(0, size_bytes, READ_BYTES):
        os.preadv(descriptor, [buffer], offset)
    return size_bytes / (time.perf_counter() - began_s) / 1e9
