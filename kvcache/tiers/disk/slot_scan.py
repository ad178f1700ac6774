"""Finds again what a slot file holds: reads its header pages, and no payload."""

import os
from collections.abc import Callable

from kvcache.tiers.disk.disk_calls import DiskCalls, advise
from kvcache.tiers.disk.slot_format import HEADER_BYTES, HeaderFormat
from kvcache.tiers.interface import Slot, SlotHeader
from kvcache.tiers.pages import PAGE_BYTES

Found = Callable[[Slot, SlotHeader], None]
BATCH_SLOTS = 256
"""Header pages that are read ahead at one time."""


def scan_headers(
    file: int, offsets: range, form: HeaderFormat, found: Found, is_stopped: Callable[[], bool], calls: DiskCalls
) -> None:
    """Tells of every slot that holds a block, in order; slot i's header is at `offsets[i]`. Through the kernel's cache,
    which it leaves as it was. Raises OSError."""
    page = memoryview(bytearray(HEADER_BYTES))
    _read_ahead(file, offsets[:BATCH_SLOTS])
    for first in range(0, len(offsets), BATCH_SLOTS):
        if is_stopped():
            return
        batch = offsets[first : first + BATCH_SLOTS]
        _read_ahead(file, offsets[first + BATCH_SLOTS : first + 2 * BATCH_SLOTS])
        for slot, offset in enumerate(batch, first):
            calls.read(file, [page], offset)
            header = form.unpack(page.tobytes())
            if header is not None:
                found(Slot(slot), header)
        advise(file, batch.start, batch.stop - batch.start, os.POSIX_FADV_DONTNEED)


def _read_ahead(file: int, offsets: range) -> None:
    """All of them at one time: one after the other, each page would wait for the disk."""
    for offset in offsets:
        advise(file, offset, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
