"""What a worker knows of its blocks: where each lies, what it hangs on, and how it was used.

A row for each block that lies in HBM, DDR or SSD, and for each predecessor that is named by one of them but lies in no
tier (a *ghost*: the root of a prompt, or a block that was lost): about 90 bytes a block all in all. Numbers in, numbers
out: no clock, no chance and no I/O. Places (blocks of the pool, slots) are kept counting from 1, because untouched
memory is zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash, TenantTag
from baton.latency import TIERS, Tier
from kvcache.eviction.interface import Candidates, Counts
from kvcache.name_table import NO_ROW, NameTable, Rows
from kvcache.tiers.index.row_set import RowSet
from kvcache.tiers.index.tenants import Tenants
from kvcache.tiers.interface import LowerTier, SlotHeader, StorageFormat

USES_MAX: Final = 2**16 - 1
COPIES_MAX: Final = 2**8 - 2
JUMPS_MAX: Final = 12
"""Prompts of up to 4096 blocks."""


class Mark:
    """Bits; plain numbers, because enum's take a microsecond each."""

    DIGESTED: Final = 1
    """`digest` is known: of its row below HBM, or else of its block in HBM."""
    MOVING: Final = 2
    """On its way down: it is copied nowhere else meanwhile, and stays where it is."""
    GOING: Final = 4
    """Copied down because HBM would soon evict it, and not used since."""
    FROM_BELOW: Final = 8
    """Its block in HBM was restored from its slot: the same bytes."""
    PROMISED: Final = 16
    PINNED: Final = 32
    """A peer is about to read it."""
    DECLINED: Final = 64
    """Dropped from DDR, or moved on, although HBM would soon evict it, and not used since: it has been weighed, and is
    not copied down again before HBM does evict it."""
    BUSY: Final = MOVING | PINNED


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
        self._mark, self._digest = self.marks.data, self.digest.data
        self._cleared = [column.data for column in (self.depth, self.used_at, self.uses, self.copies, self.digest)]
        self.counts: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        self._ddr_leaves, self._ssd_leaves = RowSet(ddr_slots, end), RowSet(ssd_slots, end)
        self.leaves: dict[LowerTier, RowSet] = {"ddr": self._ddr_leaves, "ssd": self._ssd_leaves}
        """What may go. From DDR: nothing follows on it in HBM or DDR; from the SSD: nothing in any tier."""
        self.spare = RowSet(ddr_slots, end)
        self._in_leaves = self._ddr_leaves.places, self._ssd_leaves.places, self.spare.places
        """In DDR, and on the SSD too: their slots in DDR are free at once, at no loss."""
        self.unsaved: dict[int, None] = {}
        """In HBM and in no lower tier, in the order in which they came; without what is on its way down, and what was
        DECLINED there."""
        self.has_ssd = ssd_slots > 0
        """Turned off: what was promised may not leave DDR."""

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
        row = self.table.find(name) or self.table.add(name)
        assert row != NO_ROW and not self.is_present(row)
        if parent is not None and parent != name:
            above = self.table.find(parent) or self.table.add(parent)
            assert above != NO_ROW
            self._parent[row] = above
        self.depth[row], self.used_at[row] = depth, now_s
        self.tenant[row] = self.tenants.enter(tenant)
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
        tenant = self.tenants.tag(int(self.tenant[row]))
        name, digest = self.table.name(row), int(self.digest[row])
        return SlotHeader(name, parent, int(self.depth[row]), digest, storage, tenant, keep_until)

    # ---- places

    def put(self, row: int, tier: Tier, place: int) -> None:
        """It lies there too, from now on."""
        assert not self._place_of[tier][row], f"in {tier} already"
        hbm, ddr, ssd = self._hbm[row], self._ddr[row], self._ssd[row]
        self._place_of[tier][row] = place + 1
        self.counts[tier] += 1
        if tier == "hbm":
            self._row_in_block[place] = row
            if not (ddr or ssd):
                self.unsaved[row] = None
        else:
            self.unsaved.pop(row, None)
        above = self._parent[row]
        is_first, is_first_upper = not (hbm or ddr or ssd), tier != "ssd" and not (hbm or ddr)
        if above and (is_first or is_first_upper):
            self._children[above] += is_first
            self._upper[above] += is_first_upper
            self.refresh(above)
        self.refresh(row)

    def drop(self, row: int, tier: Tier) -> int:
        """It no longer lies there; where that was. The row may be gone with it."""
        place = self.place(row, tier)
        self._place_of[tier][row] = 0
        hbm, ddr, ssd = self._hbm[row], self._ddr[row], self._ssd[row]
        self.counts[tier] -= 1
        if tier == "hbm":
            self._row_in_block[place] = NO_ROW
            self.unsaved.pop(row, None)
            self._mark[row] &= ~(Mark.FROM_BELOW | Mark.DECLINED)
        else:
            self._left_below(row, tier)
        above = self._parent[row]
        is_gone, is_last_upper = not (hbm or ddr or ssd), tier != "ssd" and not (hbm or ddr)
        if above and (is_gone or is_last_upper):
            self._children[above] -= is_gone
            self._upper[above] -= is_last_upper
            self.refresh(above)
        self.refresh(row)
        if is_gone:
            self._vanish(row)
        return place

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

    def _is_upper(self, row: int) -> bool:
        return bool(self._hbm[row] or self._ddr[row])

    def _vanish(self, row: int) -> None:
        """It lies nowhere any more: a ghost if blocks hang on it, else gone."""
        self.tenants.leave(int(self.tenant[row]))
        above, self._parent[row] = self._parent[row], NO_ROW
        for column in self._cleared:
            column[row] = 0
        self.tenant[row] = self._mark[row] = 0
        for each in (row, above):
            if each and not self.is_present(each) and not self._children[each]:
                assert not self._upper[each]
                self.table.remove(each)

    def refresh(self, row: int) -> None:
        """Whether it may go, after a change."""
        mark, in_ddr, in_ssd = self._mark[row], self._ddr[row] > 0, self._ssd[row] > 0
        is_idle, is_free = not mark & Mark.BUSY, not mark & Mark.PROMISED
        may_leave_ddr = in_ddr and is_idle and (is_free or self.has_ssd) and not self._upper[row]
        may_leave_ssd = in_ssd and is_idle and is_free and not self._children[row]
        is_spare = in_ddr and in_ssd and is_idle
        ddr_leaves, ssd_leaves, spare = self._in_leaves
        if may_leave_ddr != (ddr_leaves[row] > 0):
            self._ddr_leaves.put(row, may_leave_ddr)
        if may_leave_ssd != (ssd_leaves[row] > 0):
            self._ssd_leaves.put(row, may_leave_ssd)
        if is_spare != (spare[row] > 0):
            self.spare.put(row, is_spare)

    def mark(self, row: int, mark: int, is_so: bool) -> None:
        self._mark[row] = self._mark[row] | mark if is_so else self._mark[row] & ~mark
        if mark & (Mark.BUSY | Mark.PROMISED):
            self.refresh(row)

    def is_marked(self, row: int, mark: int) -> bool:
        """With any of these."""
        return bool(self._mark[row] & mark)

    # ---- use and worth

    def use(self, rows: Rows, now_s: float) -> None:
        """These are used now."""
        self.used_at[rows] = now_s
        self.marks[rows] &= ~np.uint8(Mark.GOING | Mark.DECLINED)

    def age_orphans(self) -> None:
        """What lies below HBM and cannot be found, as a block before it lies nowhere: as if it had never been used. So
        it goes first, unless its head comes back and it is used. O(rows)."""
        end = self.table.rows_used + 1
        is_present = self.are_present(np.arange(end))
        parent = self.parent[:end]
        above = np.where(is_present & is_present[parent] & (parent > 0), parent, np.arange(end))
        for _ in range(JUMPS_MAX):  # each twice as far
            above = above[above]
        is_orphan = is_present & (self.depth[above] > 0) & (self.places["hbm"][:end] == 0)
        self.used_at[:end][is_orphan] = -np.inf

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

    def candidates(self, rows: Rows, now_s: float, saved_s: Callable[[int], float], size_bytes: int) -> Candidates:
        depths = self.depth[rows]
        return Candidates(
            age_s=np.maximum(now_s - self.used_at[rows], 0.0),
            uses=self.uses[rows].astype(np.int32),
            depth=depths,
            saved_s=np.fromiter(map(saved_s, depths.tolist()), np.float64, len(depths)),
            size_bytes=size_bytes,
            copies=np.maximum(self.copies[rows].astype(np.int32) - 1, 0),
        )

    def chain(self, row: int, tier: LowerTier, length_max: int) -> list[int]:
        """A leaf and what it alone hangs on, as often used as it: the leaf first. They go together, and come back
        together."""
        chain = [row]
        followers = self._upper if tier == "ddr" else self._children
        uses = self.uses[row]
        while len(chain) < length_max:
            row = self._parent[row]
            is_alone = row and self._place_of[tier][row] and followers[row] == 1 and self.uses[row] == uses
            if not is_alone or self.is_marked(row, Mark.BUSY | Mark.PROMISED):
                break
            chain.append(row)
        return chain

    # ---- many at once: O(rows), a fraction of a microsecond each

    def drop_below(self, rows: Rows, tiers: Sequence[LowerTier]) -> tuple[dict[LowerTier, list[int]], Rows]:
        """These rows leave these tiers, where some of them lie and what is written of them counts for nothing. Where
        they lay; and the rows that lie nowhere now, whose names are to be asked for before `remove_gone`."""
        places: dict[LowerTier, list[int]] = {}
        for tier in tiers:
            column = self.places[tier]
            there = rows[column[rows] > 0]
            places[tier] = (column[there] - 1).tolist()
            column[there] = 0
            self.counts[tier] -= len(there)
            if tier == "ddr":
                self.marks[there] &= ~np.uint8(Mark.MOVING)
        out = rows[(self.places["ddr"][rows] | self.places["ssd"][rows]) == 0]
        self.marks[out] &= ~np.uint8(Mark.DIGESTED | Mark.GOING | Mark.FROM_BELOW)
        in_hbm = self.places["hbm"][out] > 0
        copyable = (self.marks[out] & np.uint8(Mark.DECLINED | Mark.MOVING)) == 0
        self.unsaved.update(dict.fromkeys(out[in_hbm & copyable].tolist()))
        return places, out[~in_hbm]

    def remove_gone(self, gone: Rows) -> None:
        """After `drop_below`: everything that hangs on it is made right."""
        for number, blocks in zip(
            *(each.tolist() for each in np.unique(self.tenant[gone], return_counts=True)), strict=True
        ):
            self.tenants.leave(number, blocks)
        columns: list[NDArray[Any]] = [self.parent, self.depth, self.used_at, self.uses, self.copies, self.digest]
        for column in (*columns, self.tenant, self.marks):
            column[gone] = 0
        end = self.table.rows_used + 1
        hbm, ddr, ssd = (self.places[tier][:end] > 0 for tier in TIERS)
        parent, is_upper = self.parent[:end], hbm | ddr
        self.children[:end] = np.bincount(parent[is_upper | ssd], minlength=end)
        self.upper_children[:end] = np.bincount(parent[is_upper], minlength=end)
        self.children[NO_ROW] = self.upper_children[NO_ROW] = 0
        self.table.keep(is_upper | ssd | (self.children[:end] > 0))
        self._refresh_all(ddr, ssd)

    def _refresh_all(self, ddr: NDArray[np.bool_], ssd: NDArray[np.bool_]) -> None:
        marks = self.marks[: len(ddr)]
        is_idle, is_free = (marks & np.uint8(Mark.BUSY)) == 0, (marks & np.uint8(Mark.PROMISED)) == 0
        no_upper, no_child = self.upper_children[: len(ddr)] == 0, self.children[: len(ddr)] == 0
        self._ddr_leaves.fill(np.flatnonzero(ddr & is_idle & (is_free | self.has_ssd) & no_upper))
        self._ssd_leaves.fill(np.flatnonzero(ssd & is_idle & is_free & no_child))
        self.spare.fill(np.flatnonzero(ddr & ssd & is_idle))

    def rows_of(self, tenant: TenantTag | None) -> Rows:
        """A tenant's blocks, or all. O(rows)."""
        end = self.table.rows_used + 1
        is_its = self.are_present(np.arange(end))
        if tenant is not None:
            is_its &= self.tenant[:end] == self.tenants.find(tenant)
        return np.flatnonzero(is_its)

    def rows_below(self, tenant: TenantTag | None) -> Rows:
        """Of these, the ones below HBM."""
        rows = self.rows_of(tenant)
        return rows[(self.places["ddr"][rows] | self.places["ssd"][rows]) > 0]

    @property
    def size_bytes(self) -> int:
        """Resident, up to the highest row that was used: the table, the columns and the sets of leaves."""
        links = (self.parent, self.depth, self.children, self.upper_children)
        columns: list[NDArray[Any]] = [*self.places.values(), *links, self.used_at, self.uses, self.copies]
        columns += [self.digest, self.tenant, self.marks]
        sets = (*self.leaves.values(), self.spare)
        a_row = sum(int(column.dtype.itemsize) for column in columns) + len(sets) * np.dtype(np.int32).itemsize
        members = (self.row_in_block.size + sum(map(len, sets))) * np.dtype(np.int32).itemsize
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
                upper[above] += self._is_upper(row)
        for row in rows:
            assert (children[row], upper[row]) == (self._children[row], self._upper[row])
            assert self.is_present(row) or children[row], "a row for nothing"
            sets = (*self.leaves.values(), self.spare)
            was = [row in each for each in sets]
            self.refresh(row)
            assert was == [row in each for each in sets], "leaves are out of date"
        assert all(self._hbm[row] and not self.lies_below(row) for row in self.unsaved)
        for tier in TIERS:
            taken = [self._place_of[tier][row] for row in rows if self._place_of[tier][row]]
            assert len(taken) == len(set(taken)) == self.counts[tier], f"two blocks in one place of {tier}"
