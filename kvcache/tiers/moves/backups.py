"""DDR to SSD before DDR runs full: so that a block can leave DDR, or HBM, at once, and outlives the process.

Nothing waits for it, and it waits for everything else: it writes a batch at a time while the disk has nothing else to
do. Heads go before tails, for what lies on the SSD without its head cannot be found after a restart. Of wear: as long
as one in ROOM_DIVISOR of the SSD's slots is free, all blocks are written, which a file sees once, when it fills; after
that only those that were used again.
"""

from typing import Final

import numpy as np

from kvcache.name_table import Rows
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.moves.demotions import ROOM_DIVISOR, Demotions

LITTLE_DIVISOR: Final = 64
"""With fewer free slots than one in so many it does not look for anything: demotions need them."""
BATCH: Final = 64
BYTES_DIVISOR: Final = 4
"""A batch takes no more than one byte in so many of those that may be in flight."""
CHUNK: Final = 1024
"""Rows that are looked at in one turn: 50 microseconds."""


class Backups:
    def __init__(self, shelves: Shelves, demotions: Demotions, bytes_max: int) -> None:
        self._shelves, self._demotions = shelves, demotions
        self._batch = min(BATCH, max(1, bytes_max // BYTES_DIVISOR // shelves.row_bytes))
        self._next_row = 1
        self._left = 0
        """Rows still to be looked at before there is nothing to do."""
        self._seen_at: tuple[int, int] | None = None

    @property
    def _is_on(self) -> bool:
        return self._shelves.has_ssd and self._demotions.is_scanned

    @property
    def is_looking(self) -> bool:
        """There are rows that it has not looked at since something came down."""
        slots = self._shelves.slots["ssd"]
        return self._is_on and self._left > 0 and slots.free > slots.total // LITTLE_DIVISOR

    def look_again(self) -> None:
        """Blocks were used."""
        if not self._demotions.has_room_below:
            self._seen_at = None

    def begin(self, room_bytes: int) -> None:
        """The next batch, if nothing is written at the moment and there is so much room in flight."""
        stored = self._shelves.stored_blocks
        if self._seen_at != (now := (stored["ddr"], stored["ssd"])):
            self._seen_at, self._left = now, self._shelves.index.table.rows_used + CHUNK
        if not self.is_looking or self._demotions.under_way:
            return
        slots = self._shelves.slots["ssd"]
        free = slots.free - (slots.total // ROOM_DIVISOR if self._demotions.has_room_below else 0)
        count = min(self._batch, room_bytes // self._shelves.row_bytes, free)
        if count <= 0:
            return
        rows = self._next(count)
        if rows:
            self._demotions.back_up(rows)

    def _next(self, count: int) -> list[int]:
        """Of the next rows, those that may be copied. The same ones are looked at again while some are found."""
        index = self._shelves.index
        first = self._next_row if self._next_row <= index.table.rows_used else 1
        rows = np.arange(first, min(first + CHUNK, index.table.rows_used + 1))
        found = self._whole(self._wanted(rows), count)
        if not found:
            self._next_row = first + CHUNK
            self._left -= CHUNK
        return found

    def _wanted(self, rows: Rows) -> Rows:
        """In DDR and not on the SSD."""
        index = self._shelves.index
        are_wanted = (index.places["ddr"][rows] > 0) & (index.places["ssd"][rows] == 0)
        are_wanted &= (index.marks[rows] & np.uint8(Mark.MOVING)) == 0
        if not self._demotions.has_room_below:
            are_wanted &= index.uses[rows] > 0
        wanted: Rows = rows[are_wanted]
        return wanted

    def _whole(self, rows: Rows, count: int) -> list[int]:
        """The first of them, by depth, that are heads or whose predecessor is on the SSD, or goes before them."""
        index = self._shelves.index
        if not len(rows):
            return []
        rows = rows[np.argsort(index.depth[rows], kind="stable")]
        parents = index.parent[rows]
        is_root = (index.depth[rows] == 0) | (index.places["ssd"][parents] > 0)
        if not is_root.any():
            return []
        found: dict[int, None] = {}
        for row, parent, is_first in zip(rows.tolist(), parents.tolist(), is_root.tolist(), strict=True):
            if is_first or parent in found:
                found[row] = None
                if len(found) == count:
                    break
        return list(found)
