"""HBM to DDR: in the background what will be evicted soon, or all of it while there is room below; at once what is
evicted before."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash, BlockId
from kvcache.name_table import NO_ROW
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.index.worth import Worth
from kvcache.tiers.interface import PoolView, Slot
from kvcache.tiers.moves.demotions import ROOM_DIVISOR, Demotions
from kvcache.tiers.moves.store_io import Job, StoreIo

AHEAD: Final = 64
"""Blocks that are copied down before they are evicted: more than most steps evict."""
AHEAD_DIVISOR: Final = 8
"""But no more than one in so many of the pool's at one time: they are held meanwhile."""
BATCH: Final = 16
"""What need not be copied yet waits until it is so much, while sequences run: each copy disturbs a step a little."""
BYTES_DIVISOR: Final = 2
"""What need not be copied yet takes no more than one byte in so many of those that may be in flight."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Blocks that are held, on their way into slots that are nobody's yet."""

    job: Job[Sequence[int | None]]
    rows: tuple[int, ...]
    names: tuple[BlockHash, ...]
    """What was cleared meanwhile may have lost its row to another."""
    blocks: tuple[BlockId, ...]
    slots: tuple[Slot, ...]


class Offloads:
    def __init__(
        self,
        shelves: Shelves,
        io: StoreIo,
        worth: Worth,
        demotions: Demotions,
        hbm_blocks: int,
        bytes_max: int,
    ) -> None:
        """`bytes_max`: in flight, and copied by one `flush`. A block of HBM is taken to be as large as a row."""
        self._shelves, self._io, self._worth, self._demotions = shelves, io, worth, demotions
        self._held_max = max(1, hbm_blocks // AHEAD_DIVISOR)
        self._ahead = min(AHEAD, self._held_max)
        self._bytes_max = bytes_max
        self._batch = min(BATCH, self._held_max)
        self._now_max = max(1, bytes_max // shelves.row_bytes)
        self.under_way: list[Offload] = []
        self._void: set[BlockHash] = set()
        """Blocks on their way down that nobody wants there any more."""
        self.is_due = False
        """The order in which HBM evicts has changed, or what has been copied."""

    # ---- in the background

    def take_in(self, pool: PoolView | None) -> None:
        """What has ended: its blocks are let go, its slots are found from now on."""
        ended = [offload for offload in self.under_way if offload.job.is_done]
        if not ended:
            return
        self.under_way = [offload for offload in self.under_way if not offload.job.is_done]
        self.is_due = True
        for offload in ended:
            digests = [None] * len(offload.rows) if offload.job.error else offload.job.result
            for name, slot, digest in zip(offload.names, offload.slots, digests, strict=True):
                self._arrive(name, slot, digest)
            if pool is not None:
                pool.release(offload.blocks, is_used=False)

    def _arrive(self, name: BlockHash, slot: Slot, digest: int | None) -> None:
        row = self._shelves.index.find(name)
        if row == NO_ROW:
            self._shelves.slots["ddr"].give_back(slot)
        else:
            self._land(row, slot, None if name in self._void else digest)
        self._void.discard(name)

    def _land(self, row: int, slot: Slot, digest: int | None) -> None:
        """None: it cannot be stored. The SSD's scan may have found it meanwhile: what lies there was found first."""
        index = self._shelves.index
        index.mark(row, Mark.MOVING, False)
        is_other = index.lies_below(row) and not index.is_marked(row, Mark.FROM_BELOW)
        if digest is None or is_other:
            self._shelves.slots["ddr"].give_back(slot)
        else:
            index.note_digest(row, digest)
            self._shelves.put_down(row, "ddr", slot)
            index.mark(row, Mark.GOING, True)

    def begin(self, pool: PoolView, block_bytes: int, now_s: float) -> None:
        """Copies what is in no lower tier, as much as may be on its way: what will be evicted soon, and then, while
        there is room below, the rest in the order in which it came."""
        room = (self._bytes_max - self._io.bytes_in_flight) // block_bytes
        held = sum(len(offload.rows) for offload in self.under_way)
        if self.is_due and min(self._ahead - held, room) > 0:
            self.is_due = False
            held += self._send(pool, self._soon(pool, min(self._ahead - held, room)))
        room = (self._bytes_max // BYTES_DIVISOR - self._io.bytes_in_flight) // block_bytes
        unsaved, is_idle = len(self._shelves.index.unsaved), pool.used <= held
        count = min(self._held_max - held, room, unsaved)
        if count > 0 and (is_idle or unsaved >= self._batch):
            self._send(pool, self._oldest(min(count, self._room_below(count, now_s))))

    def _soon(self, pool: PoolView, count: int) -> list[tuple[int, BlockId]]:
        blocks = np.array([block for block, _ in pool.upcoming(self._ahead)], np.int64)
        rows = self._shelves.index.row_in_block[blocks]
        wanted = np.flatnonzero(self._are_wanted(rows))[: min(count, self._shelves.slots["ddr"].free)]
        return list(zip(rows[wanted].tolist(), map(BlockId, blocks[wanted].tolist()), strict=True))

    def _oldest(self, count: int) -> list[tuple[int, BlockId]]:
        index = self._shelves.index
        return [(row, BlockId(index.place(row, "hbm"))) for row in islice(index.unsaved, count)]

    def _room_below(self, count: int, now_s: float) -> int:
        """Slots of DDR that are free, beside those that are kept so; or can be, as what they hold is on the SSD too.
        Where all tiers are full, what HBM does not evict soon would only push out what is in no other tier."""
        slots = self._shelves.slots["ddr"]
        if self._demotions.has_room_below:
            self._demotions.room.shed(self._demotions.free_wanted + count, now_s)
            return max(0, slots.free - self._demotions.free_wanted)
        return max(0, slots.free - max(self._demotions.free_wanted, slots.total // ROOM_DIVISOR))

    def _are_wanted(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """What came up from the SSD is worth a place in DDR the second time, while there is room."""
        index = self._shelves.index
        marks = index.marks[rows]
        are_lacking = (index.places["ssd"][rows] == 0) | ((marks & np.uint8(Mark.FROM_BELOW)) > 0)
        are_lacking &= (index.places["ddr"][rows] == 0) & (rows != NO_ROW)
        are_wanted: NDArray[np.bool_] = are_lacking & ((marks & np.uint8(Mark.MOVING | Mark.DECLINED)) == 0)
        return are_wanted

    def _send(self, pool: PoolView, wanted: Sequence[tuple[int, BlockId]]) -> int:
        """For which there are slots; how many."""
        if not wanted:
            return 0
        index = self._shelves.index
        rows, blocks = zip(*wanted, strict=True)
        slots = self._shelves.slots["ddr"].take(len(rows))
        self._demotions.arrived += len(rows)
        pool.hold(blocks)
        for row in rows:
            index.mark(row, Mark.MOVING, True)
            index.unsaved.pop(row, None)
        job = self._io.offload(blocks, slots, self._known(rows))
        names = tuple(index.table.names(np.asarray(rows, np.int64)))
        self.under_way.append(Offload(job, rows, names, blocks, tuple(slots)))
        return len(rows)

    def _known(self, rows: Sequence[int]) -> list[int | None]:
        return [self._shelves.index.digest_of(row) for row in rows]

    def void(self, rows: Iterable[int]) -> None:
        """Those of these rows that are on their way down end there."""
        unwanted = set(rows)
        for offload in self.under_way:
            self._void.update(name for row, name in zip(offload.rows, offload.names, strict=True) if row in unwanted)

    # ---- at once

    def flush(self, removed: Sequence[BlockId], now_s: float) -> None:
        """These blocks have been evicted and are about to be overwritten. The best of those that lie nowhere else are
        copied down, as many as there is room for."""
        index = self._shelves.index
        rows = [(index.row_of_block(block), block) for block in removed]
        needed = [(row, block) for row, block in rows if not index.lies_below(row)]
        for row, _ in rows:
            if index.lies_below(row):
                self._shelves.drop(row, "hbm")  # before room is made: its copy below is the last one now
        if needed:
            self._copy_now(self._chosen(needed, now_s))
            for row, _ in needed:
                self._shelves.let_drop(row, "hbm")
        self.is_due = True

    def _chosen(self, needed: list[tuple[int, BlockId]], now_s: float) -> list[tuple[int, BlockId]]:
        room = min(self._now_max, len(needed))
        if room < len(needed) or self._shelves.slots["ddr"].free < room:
            values = self._worth.values([row for row, _ in needed], now_s)
            order = np.argsort(-values, kind="stable")[:room].tolist()
            self._demotions.room.drop_for(values[order].tolist(), now_s)
            needed = [needed[at] for at in order]
        return needed[: self._shelves.slots["ddr"].free]

    def _copy_now(self, chosen: Sequence[tuple[int, BlockId]]) -> None:
        if not chosen:
            return
        rows, blocks = zip(*chosen, strict=True)
        self._demotions.arrived += len(rows)
        slots = self._shelves.slots["ddr"].take(len(rows))
        digests = self._io.offload_now(blocks, slots, self._known(rows))
        for row, slot, digest in zip(rows, slots, digests, strict=True):
            self._land(row, slot, digest)
