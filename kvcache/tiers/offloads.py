"""HBM to DDR: in the background what will be evicted soon, at once what is evicted before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from baton.ids import BlockId
from kvcache.name_table import NO_ROW
from kvcache.tiers.demotions import Demotions
from kvcache.tiers.index import Mark
from kvcache.tiers.interface import PoolView, Slot
from kvcache.tiers.shelves import Shelves
from kvcache.tiers.store_io import Job, StoreIo
from kvcache.tiers.worth import Worth

AHEAD: Final = 64
"""Blocks that are copied down before they are evicted: more than most steps evict."""
AHEAD_DIVISOR: Final = 8
"""But no more than one in so many of the pool's: they are held meanwhile."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Blocks that are held, on their way into slots that are nobody's yet."""

    job: Job[Sequence[int | None]]
    rows: tuple[int, ...]
    blocks: tuple[BlockId, ...]
    slots: tuple[Slot, ...]


class Offloads:
    def __init__(
        self, shelves: Shelves, io: StoreIo, worth: Worth, demotions: Demotions, hbm_blocks: int, bytes_max: int
    ) -> None:
        """`bytes_max`: in flight, and copied by one `flush`. A block of HBM is taken to be as large as a row."""
        self._shelves, self._io, self._worth, self._demotions = shelves, io, worth, demotions
        self._ahead = min(AHEAD, max(1, hbm_blocks // AHEAD_DIVISOR))
        self._bytes_max = bytes_max
        self._now_max = max(1, bytes_max // shelves.row_bytes)
        self.under_way: list[Offload] = []
        self._void: set[int] = set()
        """Rows on their way down that nobody wants there any more."""
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
            for row, slot, digest in zip(offload.rows, offload.slots, digests, strict=True):
                self._land(row, slot, digest)
            if pool is not None:
                pool.release(offload.blocks, is_used=False)

    def _land(self, row: int, slot: Slot, digest: int | None) -> None:
        """None: it cannot be stored. The SSD's scan may have found it meanwhile: what lies there was found first."""
        index = self._shelves.index
        index.mark(row, Mark.MOVING, False)
        is_other = index.lies_below(row) and not index.is_marked(row, Mark.FROM_BELOW)
        if digest is None or row in self._void or is_other:
            self._shelves.slots["ddr"].give_back(slot)
        else:
            index.note_digest(row, digest)
            self._shelves.put_down(row, "ddr", slot)
            index.mark(row, Mark.GOING, True)
        self._void.discard(row)

    def begin(self, pool: PoolView, block_bytes: int) -> None:
        """Copies what will be evicted soon and is in no lower tier, as much as may be on its way."""
        room = (self._bytes_max - self._io.bytes_in_flight) // block_bytes
        count = min(self._ahead - sum(len(offload.rows) for offload in self.under_way), room)
        if not self.is_due or count <= 0:
            return
        self.is_due = False
        rows = [(self._shelves.index.row_of_block(block), block) for block, _ in pool.upcoming(self._ahead)]
        wanted = [(row, block) for row, block in rows if row != NO_ROW and self._is_wanted(row)][:count]
        slots = self._shelves.slots["ddr"].take(len(wanted))
        if slots:
            self._send(pool, wanted[: len(slots)], slots)

    def _is_wanted(self, row: int) -> bool:
        """What came up from the SSD is worth a place in DDR the second time, while there is room."""
        index = self._shelves.index
        if index.is_marked(row, Mark.MOVING | Mark.DECLINED) or index.is_in(row, "ddr"):
            return False
        return not index.is_in(row, "ssd") or index.is_marked(row, Mark.FROM_BELOW)

    def _send(self, pool: PoolView, wanted: Sequence[tuple[int, BlockId]], slots: Sequence[Slot]) -> None:
        index = self._shelves.index
        rows, blocks = zip(*wanted, strict=True)
        self._demotions.arrived += len(rows)
        pool.hold(blocks)
        for row in rows:
            index.mark(row, Mark.MOVING, True)
        job = self._io.offload(blocks, slots, self._known(rows))
        self.under_way.append(Offload(job, rows, blocks, tuple(slots)))

    def _known(self, rows: Sequence[int]) -> list[int | None]:
        return [self._shelves.index.digest_of(row) for row in rows]

    def void(self, rows: Sequence[int]) -> None:
        """Those of these rows that are on their way down end there."""
        on_their_way = {row for offload in self.under_way for row in offload.rows}
        self._void |= on_their_way.intersection(rows)

    # ---- at once

    def flush(self, removed: Sequence[BlockId], now_s: float) -> None:
        """These blocks have been evicted and are about to be overwritten. The best of those that lie nowhere else are
        copied down, as many as there is room for."""
        index = self._shelves.index
        rows = [index.row_of_block(block) for block in removed]
        needed = [(row, block) for row, block in zip(rows, removed, strict=True) if not index.lies_below(row)]
        if needed:
            self._copy_now(self._chosen(needed, now_s))
        for row in rows:
            self._shelves.let_drop(row, "hbm")
        self.is_due = True

    def _chosen(self, needed: list[tuple[int, BlockId]], now_s: float) -> list[tuple[int, BlockId]]:
        room = min(self._now_max, len(needed))
        if room < len(needed) or self._shelves.slots["ddr"].free < room:
            values = self._worth.values([row for row, _ in needed], now_s)
            order = np.argsort(-values, kind="stable")[:room].tolist()
            self._demotions.drop_for(values[order].tolist(), now_s)
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
