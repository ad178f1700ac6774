"""A worker's KV on its local disk: one preallocated file of slots, each a header page and a block's payload.

Nothing is synced. What a killed process had handed to the kernel is there when the file is opened again; a write that
it died in, and what a power cut took, leave a slot whose header or whose payload is not what was written. A torn header
reads as an empty slot. A torn payload is seen by whoever compares it with the digest in its header: that is the
caller's to do with every payload it reads.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from baton.errors import SettingsError
from baton.ids import BlockHash
from kvcache.tiers.disk.disk_calls import REAL_CALLS, DiskCalls, advise, open_direct
from kvcache.tiers.disk.slot_directory import LockedFile, claim, closed_on_error
from kvcache.tiers.disk.slot_format import HEADER_BYTES, HEADERS_OFFSET, FileStamp, HeaderFormat, Superblock, slot_bytes
from kvcache.tiers.disk.slot_scan import scan_headers
from kvcache.tiers.interface import Rows, Slot, SlotHeader
from kvcache.tiers.pages import PAGE_BYTES, whole_pages
from kvcache.tiers.rows.host_memory import HostMemory

RUN_BYTES_MAX = 4 * 2**20
"""Read or written by one system call: past it nothing is won, and nobody can be quicker than the call before."""
RUN_SLOTS_MAX = 512
"""Two buffers each, of the 1,024 that one call takes."""
CLOSED = -1


class SlotFile:
    """Raises OSError from everything that touches the disk: whoever gets one turns the tier off.

    Different threads may use different slots at one time. Rows are those of a HostMemory: page-aligned, as direct I/O
    needs them, and with room for whole pages.
    """

    def __init__(self, file: LockedFile, superblock: Superblock, calls: DiskCalls) -> None:
        """Takes over `file`."""
        self._file, self._calls = file, calls
        self._slot_bytes = slot_bytes(superblock.payload_bytes)
        self._payload_bytes = whole_pages(superblock.payload_bytes)
        self._run_slots = max(1, min(RUN_SLOTS_MAX, RUN_BYTES_MAX // self._slot_bytes))
        self._superblock = superblock
        self._format = HeaderFormat(superblock)
        self._pages: list[HostMemory] = []
        """Header pages of runs that nobody reads or writes at the moment; one for each thread at most."""
        self._blank = HostMemory(1, PAGE_BYTES)
        advise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)  # a scan wants one page of each slot
        direct = open_direct(file.path)
        self.is_direct = direct is not None
        self._fd = file.fd if direct is None else direct

    @classmethod
    def open(
        cls,
        directory: Path,
        size_bytes: int,
        stamp: FileStamp,
        payload_bytes: int,
        calls: DiskCalls = REAL_CALLS,
    ) -> Self:
        """This worker's file, found again or made (`slot_directory` says which), of `size_bytes` at most. Raises
        SettingsError, with a sentence, where the directory cannot be used or the disk is too small."""
        slots = (size_bytes - HEADERS_OFFSET) // slot_bytes(payload_bytes)
        if slots < 1:
            raise SettingsError(f"ssd_bytes is {size_bytes}, too small for one KV block of {payload_bytes} bytes.")
        file, superblock = claim(directory, Superblock(stamp, slots, payload_bytes, secrets.randbits(62)), calls)
        with closed_on_error(file):
            return cls(file, superblock, calls)

    @property
    def slots(self) -> int:
        return self._superblock.slots

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def size_bytes(self) -> int:
        return self._superblock.file_bytes

    def write(
        self, slots: Sequence[Slot], headers: Sequence[SlotHeader], rows: Rows, row_slots: Sequence[Slot]
    ) -> None:
        """Rows `row_slots` of host memory, with these headers, into the slots; adjacent ones by one call."""
        payloads = self._whole_rows(rows)
        for run in _runs(slots, self._run_slots):
            with self._header_pages() as pages:
                for page, header in enumerate(headers[run]):
                    pages[page] = np.frombuffer(self._format.pack(header), np.uint8)
                buffers = list(_alternating(pages, payloads, row_slots[run]))
                self._calls.write(self._fd, buffers, self._offset(slots[run.start]))
            self._drop_cached(slots[run])

    def read(
        self,
        slots: Sequence[Slot],
        names: Sequence[BlockHash],
        rows: Rows,
        row_slots: Sequence[Slot],
        size_bytes: int | None = None,
    ) -> list[SlotHeader | None]:
        """The slots' payloads into rows `row_slots` of host memory, or so many of their first bytes and the rest of
        the page; and their headers. None: the slot does not hold the block of that name, and its row anything."""
        payloads = self._whole_rows(rows)[:, : self._payload_bytes if size_bytes is None else whole_pages(size_bytes)]
        is_whole = payloads.shape[1] == self._payload_bytes
        headers: list[SlotHeader | None] = []
        for run in _runs(slots, self._run_slots if is_whole else 1):
            with self._header_pages() as pages:
                buffers = list(_alternating(pages, payloads, row_slots[run]))
                self._calls.read(self._fd, buffers, self._offset(slots[run.start]))
                headers += [self._header(buffer, name) for buffer, name in zip(buffers[::2], names[run], strict=True)]
            self._drop_cached(slots[run])
        return headers

    def read_on(self, slots: Sequence[Slot], rows: Rows, row_slots: Sequence[Slot], part: range) -> None:
        """These bytes of the slots' payloads, and the rest of their pages, to where they belong in the rows. Who calls
        it has read the headers, and keeps the slots from being written since."""
        begin = part.start // PAGE_BYTES * PAGE_BYTES
        payloads = self._whole_rows(rows)[:, begin : whole_pages(part.stop)]
        for slot, row in zip(slots, row_slots, strict=True):
            self._calls.read(self._fd, [memoryview(payloads[row])], self._offset(slot) + PAGE_BYTES + begin)
            self._drop_cached([slot])

    def _header(self, page: memoryview, name: BlockHash) -> SlotHeader | None:
        header = self._format.unpack(page[:HEADER_BYTES].tobytes())
        return header if header is not None and header.name == name else None

    def scan(self, found: Callable[[Slot, SlotHeader], None], is_stopped: Callable[[], bool]) -> None:
        """Tells of every slot that holds a block, in order. Other threads may write meanwhile: what it tells of their
        slots may be what they held before."""
        offsets = range(HEADERS_OFFSET, self.size_bytes, self._slot_bytes)
        scan_headers(self._file.fd, offsets, self._format, found, is_stopped, self._calls)

    def erase(self, slots: Sequence[Slot]) -> None:
        """Overwrites their headers, then gives up what followed: reads of the file see zeros there. (A file system that
        cannot do that keeps KV of unknown tokens, of nobody knows whom, until the slots are written again.)"""
        blank = [memoryview(self._blank.rows[0])]
        for slot in slots:
            self._calls.write(self._fd, blank, self._offset(slot))
        for run in _runs(slots, self.slots):
            count = run.stop - run.start
            self._calls.zero(self._fd, self._offset(slots[run.start]), count * self._slot_bytes)

    def erase_all(self) -> None:
        """No slot holds anything from its first write on, a new generation; then it erases them. The caller sees to it
        that nobody writes meanwhile."""
        superblock = replace(self._superblock, generation=self._superblock.generation + 1)
        self._file.write_superblock(superblock, self._calls)
        self._superblock, self._format = superblock, HeaderFormat(superblock)
        self.erase([Slot(slot) for slot in range(self.slots)])

    def close(self) -> None:
        """And let another process have it. Idempotent; nobody is in a call."""
        if self._fd == CLOSED:
            return
        if self.is_direct:
            os.close(self._fd)
        self._fd = CLOSED
        self._file.close()

    def _offset(self, slot: Slot) -> int:
        assert 0 <= slot < self.slots
        return HEADERS_OFFSET + slot * self._slot_bytes

    def _whole_rows(self, rows: Rows) -> Rows:
        """With the rest of each row's last page."""
        assert rows.shape[1] >= self._superblock.payload_bytes and rows.strides[1] == 1
        assert rows.strides[0] >= self._payload_bytes and not (rows.ctypes.data | rows.strides[0]) % PAGE_BYTES
        if rows.shape[1] == self._payload_bytes:
            return rows
        return np.lib.stride_tricks.as_strided(rows, (len(rows), self._payload_bytes), rows.strides)

    @contextmanager
    def _header_pages(self) -> Iterator[Rows]:
        """One for each slot of a run, the caller's until the end of the block."""
        try:
            pages = self._pages.pop()
        except IndexError:
            pages = HostMemory(self._run_slots, PAGE_BYTES)
        try:
            yield pages.rows
        finally:
            self._pages.append(pages)

    def _drop_cached(self, slots: Sequence[Slot]) -> None:
        """Where the kernel cannot read past its cache: this cache is not to push out what others need."""
        if not self.is_direct:
            size_bytes = len(slots) * self._slot_bytes
            advise(self._fd, self._offset(slots[0]), size_bytes, os.POSIX_FADV_DONTNEED)


def _runs(slots: Sequence[Slot], slots_max: int) -> Iterator[slice]:
    """Where in `slots` runs of adjacent ones lie, of at most so many."""
    start = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1 or i - start == slots_max:
            yield slice(start, i)
            start = i


def _alternating(pages: Rows, payloads: Rows, row_slots: Sequence[Slot]) -> Iterator[memoryview]:
    """A page, a row, a page, a row: as they lie in the file."""
    for page, row in enumerate(row_slots):
        yield memoryview(pages[page])
        yield memoryview(payloads[row])
