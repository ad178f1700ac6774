"""What an earlier process left on the SSD, as the scan tells of it in its own thread."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from baton.ids import TenantTag
from kvcache.name_table import NO_ROW
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.index.sweeps import age_orphans
from kvcache.tiers.interface import Slot, SlotHeader

WAITING_MAX: Final = 8192
"""Headers that wait for the engine's thread; then the scan does."""
BATCH: Final = 256
"""Taken in by one step, in about a millisecond."""


class FoundSlots:
    """Between the scan's thread, which calls `found`, and the engine's, which calls the rest."""

    def __init__(self, shelves: Shelves, wake: Callable[[], None]) -> None:
        """`wake`: there is something to take in."""
        self._shelves, self._wake = shelves, wake
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Slot, SlotHeader]] = deque()
        self._is_closed = False
        self._cleared: set[TenantTag | None] = set()

    def found(self, slot: Slot, header: SlotHeader) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < WAITING_MAX or self._is_closed)
            if self._is_closed:
                return
            self._waiting.append((slot, header))
            is_first = len(self._waiting) == 1
        if is_first:
            self._wake()

    def close(self) -> None:
        """Nobody takes them any more: the scan is not to wait."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def take_in(self, now_s: float, wall_s: float) -> bool:
        """Some of what was found. Whether more waits."""
        with self._changed:
            some = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._changed.notify_all()
            is_more = bool(self._waiting)
        for slot, header in some:
            self._add(slot, header, now_s, wall_s)
        return is_more

    def _add(self, slot: Slot, header: SlotHeader, now_s: float, wall_s: float) -> None:
        """A block that lies below HBM already is better known than what the disk says of it; and one whose bytes were
        computed anew is the same block."""
        index, slots = self._shelves.index, self._shelves.slots["ssd"]
        slots.claim(slot)
        if not self._cleared.isdisjoint((header.tenant, None)):
            slots.give_back(slot, erase=True)
            return
        row = index.find(header.name)
        if index.lies_below(row) or header.storage != self._shelves.storage:
            return
        if row == NO_ROW:
            row = index.add(header.name, header.parent, header.depth, header.tenant, now_s)
        self._shelves.put(row, "ssd", slot)
        index.note_digest(row, header.digest)
        if header.keep_until > wall_s:
            self._shelves.promises.found(row, header.tenant, header.keep_until)

    def clear(self, tenant: TenantTag | None) -> None:
        """What is found from now on of this tenant, or of all, is to be erased. Before `end`."""
        self._cleared.add(tenant)

    def end(self) -> None:
        """All have been taken in: the other slots are free, and it shows which blocks have lost their heads."""
        places = self._shelves.index.places["ssd"][: self._shelves.index.table.rows_used + 1]
        taken = [Slot(place - 1) for place in places[np.flatnonzero(places)].tolist()]
        self._shelves.slots["ssd"].free_others(taken)
        age_orphans(self._shelves.index)
