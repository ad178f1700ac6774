"""What the kernel is asked to do with a file of slots: reading and writing at a place of it, to the last byte."""

import contextlib
import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

Buffers = Sequence[memoryview]
Transfer = Callable[[int, Buffers, int], int]
"""Of a file, buffers and an offset in it: how many bytes were moved. Raises OSError."""
Range = Callable[[int, int, int], None]
"""Of a file, an offset in it and a size in bytes. Raises OSError."""
_ZERO_RANGE, _KEEP_SIZE = 0x10, 0x01
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def zero(file: int, offset: int, size_bytes: int) -> None:
    """From now on the range reads as zeros, and keeps its room on the disk; takes microseconds, whatever its size. A
    file system without FALLOC_FL_ZERO_RANGE leaves it as it is. Raises OSError."""
    if _fallocate(file, _ZERO_RANGE | _KEEP_SIZE, offset, size_bytes):
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))


@dataclass(frozen=True, slots=True)
class DiskCalls:
    """The system calls that touch the disk. Tests put others in their place, which fail, or die half-way."""

    preadv: Transfer = os.preadv
    pwritev: Transfer = os.pwritev
    allocate: Range = os.posix_fallocate
    zero: Range = zero
    truncate: Callable[[int, int], None] = os.ftruncate

    def read(self, file: int, buffers: Buffers, offset: int) -> None:
        """Fills all the buffers. Raises OSError, also where the file ends before."""
        _transfer(self.preadv, file, buffers, offset)

    def write(self, file: int, buffers: Buffers, offset: int) -> None:
        """Writes all the buffers. Raises OSError."""
        _transfer(self.pwritev, file, buffers, offset)


REAL_CALLS = DiskCalls()


def _transfer(call: Transfer, file: int, buffers: Buffers, offset: int) -> None:
    """Python itself repeats a call that a signal interrupted; one that stopped half-way goes on from there."""
    left = sum(map(len, buffers))
    while left:
        moved = call(file, buffers, offset)
        if moved <= 0:
            raise OSError(errno.EIO, "the file ends here, or the disk takes no more")
        left, offset = left - moved, offset + moved
        if left:
            buffers = list(_rest(buffers, moved))


def _rest(buffers: Buffers, moved: int) -> Iterator[memoryview]:
    for buffer in buffers:
        if moved < len(buffer):
            yield buffer[moved:]
        moved = max(0, moved - len(buffer))


def advise(file: int, offset: int, size_bytes: int, advice: int) -> None:
    """Tells the kernel what will be needed and what will not; a file system may be deaf to it."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(file, offset, size_bytes, advice)


def open_direct(path: Path) -> int | None:
    """A file for I/O past the kernel's cache; None, and a line in the log, where the file system cannot do that, which
    it may say only at a read."""
    try:
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        log.warning("no direct I/O in %s, so KV goes through the kernel's cache: %s", path.name, error.strerror)
        return None
    try:
        os.preadv(file, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
    except OSError as error:
        log.warning("no direct reads of %s, so KV goes through the kernel's cache: %s", path.name, error.strerror)
        os.close(file)
        return None
    return file
