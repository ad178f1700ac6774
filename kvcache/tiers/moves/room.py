"""Who is dropped when a tier is full: at no loss, or what is worth least."""

from collections.abc import Sequence
from typing import Final

from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.index.worth import Worth
from kvcache.tiers.interface import LowerTier, Slot

CHAIN: Final = 8
"""Blocks of one prompt that go down together, into adjacent slots: one system call brings them back."""
DROP_TURNS_MAX: Final = 4
"""Samples that one `flush` may draw, or what one chain takes on the SSD."""
DROPPED_OF_SAMPLE: Final = 32
"""Blocks of the SSD that go before another sample is drawn, which is large enough for so many."""
SHED_OF_SAMPLE: Final = 32
SHED_TURNS_MAX: Final = 32


class Room:
    """Drops blocks at once, and tells the SSD's slots out to those that are worth more than what lies there."""

    def __init__(self, shelves: Shelves, worth: Worth) -> None:
        self._shelves, self._worth = shelves, worth
        self.spared: set[int] = set()
        """Rows that the engine is about to have restored: nothing drops them at once."""
        self._ssd_weakest: list[tuple[int, float]] = []
        self._ssd_droppable = 0
        """Of the SSD, as far as is known in this turn, with what they are worth, the least last: nothing worth less is
        sent. And how many blocks may be dropped before others are drawn."""

    # ---- in DDR

    def shed(self, free_wanted: int, now_s: float) -> int:
        """Makes so many slots of DDR free, as far as that is possible at no loss: of blocks that lie on the SSD too.
        How many blocks leave it."""
        missing = first = free_wanted - self._shelves.slots["ddr"].free
        for _ in range(SHED_TURNS_MAX):
            rows = [row for row in self._worth.spare(now_s) if row not in self.spared] if missing > 0 else []
            for row in rows[: min(missing, SHED_OF_SAMPLE)]:
                self._shelves.drop(row, "ddr")
                missing -= 1
            if not rows:
                break
        return max(0, first) - max(0, missing)

    def drop_for(self, values: Sequence[float], now_s: float) -> None:
        """Makes room in DDR at once for blocks that are worth so much, the most first: what is on the SSD too goes, and
        then what can be copied again from HBM, before what is worth less. There is no time to write to the SSD."""
        self.shed(len(values), now_s)
        slots = self._shelves.slots["ddr"]
        if slots.free < len(values):
            for row, _ in self._worth.weakest("ddr", now_s):
                if slots.free < len(values) and self.is_redundant(row) and self._may_go(row, "ddr"):
                    self._shelves.drop(row, "ddr")
        for _ in range(DROP_TURNS_MAX):
            free = slots.free
            self._drop(values[free:], now_s)
            if slots.free in (free, len(values)):
                break

    def _drop(self, values: Sequence[float], now_s: float) -> None:
        """The weakest leaves of DDR, a block for each newcomer that is worth more."""
        wanted = iter(values)
        newcomer = next(wanted, None)
        index = self._shelves.index
        for row, value in self._worth.weakest("ddr", now_s, len(values)) if values else ():
            for each in index.chain(row, "ddr", CHAIN) if row in index.leaves.of["ddr"] else ():
                if newcomer is None or value >= newcomer or not self._may_go(each, "ddr"):
                    break
                self._shelves.let_drop(each, "ddr")
                newcomer = next(wanted, None)
            if newcomer is None or value >= newcomer:
                break

    # ---- on the SSD

    def draw_again(self) -> None:
        """In a new turn: what the weakest are worth is no longer known."""
        self._ssd_weakest.clear()

    def ssd_slots(self, count: int, value: float, now_s: float) -> list[Slot]:
        """Free ones, or those of blocks that are worth less than `value`."""
        slots = self._shelves.slots["ssd"]
        for _ in range(DROP_TURNS_MAX):
            if slots.free >= count:
                break
            if not (self._ssd_weakest and self._ssd_droppable):
                self._ssd_weakest = self._worth.weakest("ssd", now_s, DROPPED_OF_SAMPLE)[::-1]
                self._ssd_droppable = DROPPED_OF_SAMPLE
            self._drop_from_ssd(count, value)
        return slots.take(count)

    def _drop_from_ssd(self, free_wanted: int, value: float) -> None:
        """Of the weakest, what is worth less."""
        slots, index, weakest = self._shelves.slots["ssd"], self._shelves.index, self._ssd_weakest
        while weakest and self._ssd_droppable and slots.free < free_wanted and weakest[-1][1] < value:
            row, _ = weakest.pop()
            length = min(CHAIN, self._ssd_droppable, free_wanted - slots.free)
            for each in index.chain(row, "ssd", length) if self._may_go(row, "ssd") else ():
                if not self._may_go(each, "ssd"):
                    break
                self._shelves.let_drop(each, "ssd")
                self._ssd_droppable -= 1

    # ---- who may go

    def _may_go(self, row: int, tier: LowerTier) -> bool:
        """At once."""
        index = self._shelves.index
        if row not in index.leaves.of[tier] or row in self.spared or index.is_marked(row, Mark.PROMISED):
            return False
        return tier == "ssd" or self.is_bare(row)

    def is_bare(self, row: int) -> bool:
        """Without its copy in DDR, no block here is without its predecessor."""
        index = self._shelves.index
        return not index.children[row] or index.is_in(row, "hbm") or index.is_in(row, "ssd")

    def is_redundant(self, row: int) -> bool:
        index = self._shelves.index
        return index.is_in(row, "hbm") and not index.is_marked(row, Mark.GOING | Mark.PROMISED)
