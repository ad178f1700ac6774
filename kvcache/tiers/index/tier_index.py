"""What a worker knows of its blocks: where each lies, what it hangs on, and how it was used.

A row for each block that lies in HBM, DDR or SSD, and for each predecessor that is named by one of them but lies in no
tier (a *ghost*: the root of a prompt, or a block that was lost): about 90 bytes a block all in all. Numbers in, numbers
out: no clock, no chance and no I/O. Places (blocks of the pool, slots) are kept counting from 1, because untouched
memory is zeros.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash, TenantTag
from baton.latency import TIERS, Tier
from kvcache.eviction.interface import Counts
from kvcache.name_table import NO_ROW, NameTable, Rows
from kvcache.tiers.index.leaves import Leaves
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.tenants import Tenants
from kvcache.tiers.interface import LowerTier, SlotHeader, StorageFormat

USES_MAX: Final = 2**16 - 1
COPIES_MAX: Final = 2**8 - 2


class TierIndex:
    """Rows by name. A row number is good until the block has left its last tier and no block hangs on it any more."""

    def __init__(self, hbm_blocks: int, ddr_slots: int, ssd_slots: int) -> None:
        present_max = hbm_blocks + ddr_slots + ssd_slots
        self.table = NameTable(2 * present_max + 4)  # a ghost has a present child, and a block being added a parent
        end = self.table.rows_max + 1
        self.places = {tier: np.zeros(end, np.int32) for tier in TIERS}
        self.parent, self.depth = np.zeros(end, np.int32), np.zeros(end, np.int32)
        self.children, self.upper_children = np.zeros(end, np.int32), np.zeros(end, np.int32)
        """Blocks that follow on it and lie in any tier; in HBM or DDR."""
        self.used_at = np.zeros(end, np.float64)
        """Seconds by the clock."""
        self.uses, self.copies = np.zeros(end, np.uint16), np.zeros(end, np.uint8)
        """Reuses, as the policy counts them. Copies on other workers, plus 1; 0: not known."""
        self.digest, self.tenant = np.zeros(end, np.uint64), np.zeros(end, np.uint16)
        self.marks = np.zeros(end, np.uint8)
        self.tenants = Tenants()
        self.row_in_block = np.zeros(hbm_blocks, np.int32)
        self._row_in_block = self.row_in_block.data
        self._hbm, self._ddr, self._ssd = (self.places[tier].data for tier in TIERS)
        self._place_of = {tier: self.places[tier].data for tier in TIERS}
        self._parent, self._children, self._upper = self.parent.data, self.children.data, self.upper_children.data
        self._mark, self._digest, self._tenant = self.marks.data, self.digest.data, self.tenant.data
        self._depth, self._uses, self._copies = self.depth.data, self.uses.data, self.copies.data
        self.counts: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        self.leaves = Leaves(
            *(self.places, self.marks, self.children, self.upper_children),
            *(ddr_slots, ssd_slots),
        )
        self.unsaved: dict[int, None] = {}
        """In HBM and in no lower tier, in the order in which they came; without what is on its way down, and what was
        DECLINED there."""

    # ---- rows

    def find(self, name: BlockHash) -> int:
        """Its row if it lies in any tier, else NO_ROW."""
        row = self.table.find(name)
        return row if self.is_present(row) else NO_ROW

    def are_present(self, rows: Rows) -> NDArray[np.bool_]:
        hbm, ddr, ssd = (self.places[tier][rows] for tier in TIERS)
        are_present: NDArray[np.bool_] = (hbm | ddr | ssd) > 0
        return are_present

    def is_present(self, row: int) -> bool:
        return bool(self._hbm[row] or self._ddr[row] or self._ssd[row])

    def add(self, name: BlockHash, parent: BlockHash | None, depth: int, tenant: TenantTag, now_s: float) -> int:
        """The row of a block that will now be put into its first tier."""
        row = self.table.enter(name)
        assert row != NO_ROW and not self.is_present(row)
        if parent is not None and parent != name:
            above = self.table.enter(parent)
            assert above != NO_ROW
            self._parent[row] = above
        self._depth[row], self.used_at[row] = depth, now_s
        self._tenant[row] = self.tenants.enter(tenant)
        return row

    def row_of_block(self, block: int) -> int:
        """Of the pool; NO_ROW if its content has no name."""
        return self._row_in_block[block]

    def tier_of(self, row: int) -> Tier | None:
        """The highest."""
        return "hbm" if self._hbm[row] else "ddr" if self._ddr[row] else "ssd" if self._ssd[row] else None

    def lower_tier_of(self, row: int) -> LowerTier | None:
        """The quicker one below HBM."""
        return "ddr" if self._ddr[row] else "ssd" if self._ssd[row] else None

    def place(self, row: int, tier: Tier) -> int:
        """It lies there."""
        place = self._place_of[tier][row]
        assert place, f"not in {tier}"
        return place - 1

    def is_in(self, row: int, tier: Tier) -> bool:
        return bool(self._place_of[tier][row])

    def is_in_one(self, row: int) -> bool:
        """In one tier only."""
        return (self._hbm[row] > 0) + (self._ddr[row] > 0) + (self._ssd[row] > 0) == 1

    def lies_below(self, row: int) -> bool:
        return bool(self._ddr[row] or self._ssd[row])

    def header(self, row: int, storage: StorageFormat, keep_until: float) -> SlotHeader:
        above = self._parent[row]
        parent = self.table.name(above) if above else BlockHash(bytes(16))
        name, tenant = self.table.name(row), self.tenants.tag(self._tenant[row])
        return SlotHeader(name, parent, self._depth[row], self._digest[row], storage, tenant, keep_until)

    # ---- places

    def put(self, row: int, tier: Tier, place: int) -> None:
        """It lies there too, from now on."""
        column, hbm, ddr, ssd = self._place_of[tier], self._hbm[row], self._ddr[row], self._ssd[row]
        assert not column[row], f"in {tier} already"
        column[row] = place + 1
        self.counts[tier] += 1
        if tier == "hbm":
            self._row_in_block[place] = row
            if not (ddr or ssd):
                self.unsaved[row] = None
        else:
            self.unsaved.pop(row, None)
            self.leaves.refresh(row)
        if not (hbm or ddr):
            self._count_above(row, int(not ssd), int(tier != "ssd"))

    def drop(self, row: int, tier: Tier) -> int:
        """It no longer lies there; where that was. The row may be gone with it."""
        column = self._place_of[tier]
        place = column[row]
        assert place, f"not in {tier}"
        column[row] = 0
        hbm, ddr, ssd = self._hbm[row], self._ddr[row], self._ssd[row]
        self.counts[tier] -= 1
        if tier == "hbm":
            self._row_in_block[place - 1] = NO_ROW
            self.unsaved.pop(row, None)
            self._mark[row] &= ~(Mark.FROM_BELOW | Mark.DECLINED)
        else:
            self._left_below(row, tier)
            self.leaves.refresh(row)
        if not (hbm or ddr):
            self._count_above(row, -int(not ssd), -int(tier != "ssd"))
            if not ssd:
                self._vanish(row)
        return place - 1

    def _count_above(self, row: int, in_any: int, in_upper: int) -> None:
        """So many more that follow on its predecessor."""
        above = self._parent[row]
        if above:
            self._children[above] += in_any
            self._upper[above] += in_upper
            if self._ddr[above] or self._ssd[above]:
                self.leaves.refresh(above)

    def _left_below(self, row: int, tier: Tier) -> None:
        """What its marks say after it has left a lower tier."""
        mark, in_hbm = self._mark[row], self._hbm[row]
        if tier == "ddr" and in_hbm and mark & Mark.GOING:
            mark |= Mark.DECLINED
        if not self.lies_below(row):
            mark &= ~(Mark.DIGESTED | Mark.GOING | Mark.FROM_BELOW)
            if in_hbm and not mark & Mark.DECLINED:
                self.unsaved[row] = None
        self._mark[row] = mark

    def _vanish(self, row: int) -> None:
        """It lies nowhere any more: a ghost if blocks hang on it, else gone."""
        self.tenants.leave(self._tenant[row])
        above, self._parent[row] = self._parent[row], NO_ROW
        self._uses[row] = self._copies[row] = self._mark[row] = 0  # the rest is written by `add`, or not read before
        if not self._children[row]:
            self.table.remove(row)
        if above and not self._children[above] and not self.is_present(above):
            self.table.remove(above)

    def mark(self, row: int, mark: int, is_so: bool) -> None:
        self._mark[row] = self._mark[row] | mark if is_so else self._mark[row] & ~mark
        if mark & (Mark.BUSY | Mark.PROMISED) and (self._ddr[row] or self._ssd[row]):
            self.leaves.refresh(row)

    def is_marked(self, row: int, mark: int) -> bool:
        """With any of these."""
        return bool(self._mark[row] & mark)

    # ---- use and worth

    def use(self, rows: Rows, now_s: float) -> None:
        """These are used now."""
        self.used_at[rows] = now_s
        self.marks[rows] &= ~np.uint8(Mark.GOING | Mark.DECLINED)

    def note_uses(self, rows: Rows, uses: Counts) -> None:
        """So often they had been used before they were used last."""
        self.uses[rows] = np.minimum(uses, USES_MAX)

    def note_digest(self, row: int, digest: int) -> None:
        self._digest[row] = digest
        self._mark[row] |= Mark.DIGESTED

    def digest_of(self, row: int) -> int | None:
        return self._digest[row] if self._mark[row] & Mark.DIGESTED else None

    def note_copies(self, rows: Rows, copies: NDArray[np.int64]) -> None:
        self.copies[rows] = np.minimum(copies, COPIES_MAX) + 1

    def chain(self, row: int, tier: LowerTier, length_max: int) -> list[int]:
        """A leaf and what it alone hangs on, as often used as it: the leaf first. They go together, and come back
        together."""
        chain = [row]
        followers = self._upper if tier == "ddr" else self._children
        uses = self._uses[row]
        while len(chain) < length_max:
            row = self._parent[row]
            is_alone = row and self._place_of[tier][row] and followers[row] == 1 and self._uses[row] == uses
            if not is_alone or self.is_marked(row, Mark.BUSY | Mark.PROMISED):
                break
            chain.append(row)
        return chain

    @property
    def size_bytes(self) -> int:
        """Resident, up to the highest row that was used: the table, the columns and the sets of leaves."""
        links = (self.parent, self.depth, self.children, self.upper_children)
        columns: list[NDArray[Any]] = [*self.places.values(), *links, self.used_at, self.uses, self.copies]
        columns += [self.digest, self.tenant, self.marks]
        a_row = sum(int(column.dtype.itemsize) for column in columns) + self.leaves.size_bytes_per_row
        members = (self.row_in_block.size + self.leaves.members) * np.dtype(np.int32).itemsize
        return self.table.size_bytes + a_row * (self.table.rows_used + 1) + members

    def check_integrity(self) -> None:
        """Asserts that links, counts, leaves and places agree. O(rows)."""
        self.table.check_integrity()
        rows = [row for row in self.table._row_at if row]
        children, upper = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
        for row in rows:
            above = self._parent[row]
            if above:
                assert self.is_present(row), "a ghost has no parent"
                children[above] += 1
                upper[above] += bool(self._hbm[row] or self._ddr[row])
        for row in rows:
            assert (children[row], upper[row]) == (self._children[row], self._upper[row])
            assert self.is_present(row) or children[row], "a row for nothing"
            self.leaves.check_integrity(row)
        assert all(self._hbm[row] and not self.lies_below(row) for row in self.unsaved)
        for tier in TIERS:
            taken = [self._place_of[tier][row] for row in rows if self._place_of[tier][row]]
            assert len(taken) == len(set(taken)) == self.counts[tier], f"two blocks in one place of {tier}"
