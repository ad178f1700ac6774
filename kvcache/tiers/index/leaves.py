"""Which blocks may leave DDR or the SSD: those that no other hangs on there, and that nobody wants kept."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from baton.latency import Tier
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.row_set import RowSet
from kvcache.tiers.interface import LowerTier

Column = NDArray[np.int32]


class Leaves:
    """Reads the columns of the index, which asks for a row to be looked at again when something of it has changed."""

    def __init__(
        self,
        places: Mapping[Tier, Column],
        marks: NDArray[np.uint8],
        children: Column,
        upper_children: Column,
        ddr_slots: int,
        ssd_slots: int,
    ) -> None:
        end = len(marks)
        self._places, self._marks, self._children, self._upper_children = places, marks, children, upper_children
        self._ddr, self._ssd, self._mark = places["ddr"].data, places["ssd"].data, marks.data
        self._children_of, self._upper_of = children.data, upper_children.data
        self.of: dict[LowerTier, RowSet] = {"ddr": RowSet(ddr_slots, end), "ssd": RowSet(ssd_slots, end)}
        """What may go. From DDR: nothing follows on it in HBM or DDR; from the SSD: nothing in any tier."""
        self.spare = RowSet(ddr_slots, end)
        """In DDR, and on the SSD too: their slots in DDR are free at once, at no loss."""
        self._sets = (self.of["ddr"], self.of["ssd"], self.spare)
        self._in_ddr_leaves, self._in_ssd_leaves, self._in_spare = (each.places for each in self._sets)
        self.has_ssd = ssd_slots > 0
        """Turned off: what was promised may not leave DDR."""

    def refresh(self, row: int) -> None:
        """It has changed, or what hangs on it."""
        mark, in_ddr, in_ssd = self._mark[row], self._ddr[row] > 0, self._ssd[row] > 0
        is_idle, is_free = not mark & Mark.BUSY, not mark & Mark.PROMISED
        may_leave_ddr = in_ddr and is_idle and (is_free or self.has_ssd) and not self._upper_of[row]
        may_leave_ssd = in_ssd and is_idle and is_free and not self._children_of[row]
        is_spare = in_ddr and in_ssd and is_idle
        ddr_leaves, ssd_leaves, spare = self._sets
        if may_leave_ddr != (self._in_ddr_leaves[row] > 0):
            ddr_leaves.put(row, may_leave_ddr)
        if may_leave_ssd != (self._in_ssd_leaves[row] > 0):
            ssd_leaves.put(row, may_leave_ssd)
        if is_spare != (self._in_spare[row] > 0):
            spare.put(row, is_spare)

    def refresh_all(self, end: int) -> None:
        """All rows below `end`, which is above the highest. O(end)."""
        ddr, ssd, marks = self._places["ddr"][:end] > 0, self._places["ssd"][:end] > 0, self._marks[:end]
        is_idle, is_free = (marks & np.uint8(Mark.BUSY)) == 0, (marks & np.uint8(Mark.PROMISED)) == 0
        no_upper, no_child = self._upper_children[:end] == 0, self._children[:end] == 0
        self.of["ddr"].fill(np.flatnonzero(ddr & is_idle & (is_free | self.has_ssd) & no_upper))
        self.of["ssd"].fill(np.flatnonzero(ssd & is_idle & is_free & no_child))
        self.spare.fill(np.flatnonzero(ddr & ssd & is_idle))

    @property
    def size_bytes_per_row(self) -> int:
        return len(self._sets) * np.dtype(np.int32).itemsize

    @property
    def members(self) -> int:
        """Of all sets together; 4 bytes each."""
        return sum(map(len, self._sets))

    def check_integrity(self, row: int) -> None:
        """Asserts that a refresh of it would change nothing."""
        was = [row in each for each in self._sets]
        self.refresh(row)
        assert was == [row in each for each in self._sets], "leaves are out of date"
