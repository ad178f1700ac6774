"""Reading and writing at a place of a file, to the last byte."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Buffers = Sequence[memoryview]
Transfer = Callable[[int, Buffers, int], int]
"""Of a file, buffers and an offset in it: how many bytes were moved. Raises OSError."""


@dataclass(frozen=True, slots=True)
class DiskCalls:
    """The system calls that touch the disk. Tests put others in their place, which fail, or die half-way."""

    preadv: Transfer = os.preadv
    pwritev: Transfer = os.pwritev
    allocate: Callable[[int, int, int], None] = os.posix_fallocate
    truncate: Callable[[int, int], None] = os.ftruncate

    def read(self, file: int, buffers: Buffers, offset: int) -> None:
        """Fills all the buffers. Raises OSError, also where the file ends before."""
        _transfer(self.preadv, file, buffers, offset)

    def write(self, file: int, buffers: Buffers, offset: int) -> None:
        """Writes all the buffers. Raises OSError."""
        _transfer(self.pwritev, file, buffers, offset)


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
