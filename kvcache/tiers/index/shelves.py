"""Where blocks lie: the index, the slots and the promises, changed together."""

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash
from baton.latency import Tier
from kvcache.name_table import NO_ROW, Rows, names_of
from kvcache.tiers.index.deadlines import Deadlines
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.promises import Promises
from kvcache.tiers.index.slots import Slots
from kvcache.tiers.index.sweeps import drop_below, remove_gone, rows_below
from kvcache.tiers.index.tier_index import TierIndex
from kvcache.tiers.interface import LowerTier, Slot, SlotHeader, StorageFormat, TierState

log = logging.getLogger(__name__)
CHANGED_MAX: Final = 4096
"""Names of blocks that went together, in one report: a few milliseconds of the engine's thread and the cluster's."""
LOWER: Final[tuple[LowerTier, ...]] = ("ddr", "ssd")


class Shelves:
    """For the engine's thread. Everything that puts a block somewhere, or drops it, comes through here."""

    def __init__(self, hbm_blocks: int, ddr_slots: int, ssd_slots: int, row_bytes: int, storage: StorageFormat) -> None:
        """Of the SSD's slots nothing is known until it has been scanned."""
        self.row_bytes, self.storage = row_bytes, storage
        self.index = TierIndex(hbm_blocks, ddr_slots, ssd_slots)
        self.slots: dict[LowerTier, Slots] = {"ddr": Slots(ddr_slots, True), "ssd": Slots(ssd_slots, False)}
        self.promises = Promises(self.index, row_bytes)
        self._pins = Deadlines()
        """Monotonic: blocks that peers are about to read."""
        self._changed: dict[int, None] = {}
        self._gone: dict[BlockHash, None] = {}
        self._gone_words: list[NDArray[np.uint64]] = []
        """Rows of which something was put or dropped, and names of those that are gone: one by one, or many at once."""
        self.stored_blocks = dict.fromkeys(LOWER, 0)
        """That came down, since the start."""
        self.dropped_blocks = 0
        self.corrupt_blocks = 0
        self.ssd_off_reason = ""

    @property
    def has_ssd(self) -> bool:
        return self.index.leaves.has_ssd

    # ---- putting and dropping

    def put_down(self, row: int, tier: LowerTier, slot: Slot) -> None:
        """What came from the tier above."""
        self.stored_blocks[tier] += 1
        self.put(row, tier, slot)

    def put(self, row: int, tier: Tier, place: int) -> None:
        self.index.put(row, tier, place)
        self._changed[row] = None

    def drop(self, row: int, tier: Tier, *, erase: bool = False) -> bool:
        """It no longer lies there, and its slot is free as soon as may be. Whether it lies nowhere now; its row is
        another's then."""
        is_last = self.index.is_in_one(row)
        if is_last:
            self._changed.pop(row, None)
            self._gone[self.index.table.name(row)] = None
            if self.index.is_marked(row, Mark.PROMISED | Mark.PINNED):
                self.promises.forget(row)
                self._pins.discard(row)
        else:
            self._changed[row] = None
        place = self.index.drop(row, tier)
        if tier != "hbm":
            self.slots[tier].give_back(Slot(place), erase and tier == "ssd")
        return is_last

    def let_drop(self, row: int, tier: Tier) -> None:
        """The same, for want of room: counted if it was the last copy here."""
        self.dropped_blocks += self.drop(row, tier)

    def forget(self, row: int) -> int:
        """Below HBM, and on the disk; how many copies that were."""
        tiers = [tier for tier in LOWER if self.index.is_in(row, tier)]
        if "ddr" in tiers:
            self.index.mark(row, Mark.MOVING, False)  # to the SSD, where it is not wanted any more
        for tier in tiers:
            self.drop(row, tier, erase=True)
        return len(tiers)

    def turn_off_ssd(self, reason: str) -> None:
        """Serving goes on without it; its slots are never touched again."""
        if not self.has_ssd:
            return
        self.ssd_off_reason, self.index.leaves.has_ssd = reason, False
        log.warning("The SSD tier is off until this worker starts again: %s", reason)
        self.dropped_blocks += self._drop_many(rows_below(self.index, None), ["ssd"], erase=False)

    def forget_many(self, rows: Rows) -> int:
        """Below HBM, and on the disk; how many copies that were."""
        before = sum(self.index.counts[tier] for tier in LOWER)
        self._drop_many(rows, LOWER, erase=True)
        return before - sum(self.index.counts[tier] for tier in LOWER)

    def _drop_many(self, rows: Rows, tiers: Sequence[LowerTier], *, erase: bool) -> int:
        """How many blocks lie nowhere now."""
        if not len(rows):
            return 0
        places, gone = drop_below(self.index, rows, tiers)
        if len(gone):
            self._gone_words.append(self.index.table.words(gone))
        is_gone = ~self.index.are_present(rows)
        self._changed.update(dict.fromkeys(rows[~is_gone].tolist()))
        remove_gone(self.index, gone)
        for row in [row for row in self._changed if not self.index.is_present(row)]:
            del self._changed[row]
        for row in [row for row in self.promises if not self.index.is_present(row)]:
            self.promises.forget(row)
        for row in [row for row in self._pins if not self.index.is_present(row)]:
            self._pins.discard(row)
        for tier, slots in places.items():
            self.slots[tier].give_back_all([Slot(slot) for slot in slots], erase and tier == "ssd")
        return len(gone)

    # ---- who wants what kept

    def pin(self, rows: Sequence[int], until_s: float) -> None:
        for row in rows:
            self._pins.put_off(row, until_s)
            self.index.mark(row, Mark.PINNED, True)

    def expire(self, now_s: float, wall_s: float) -> None:
        for row in self._pins.pop_due(now_s):
            self.index.mark(row, Mark.PINNED, False)
        self.promises.expire(wall_s)

    # ---- what there is

    def header(self, row: int) -> SlotHeader:
        return self.index.header(row, self.storage, self.promises.keep_until(row))

    def located(self, names: Sequence[BlockHash]) -> list[int]:
        """The rows of the longest run of `names` that lie below HBM, from the first on."""
        if not names or not self.index.lies_below(self.index.table.find(names[0])):
            return []
        rows = self.index.table.find_all(names)
        is_below = (self.index.places["ddr"][rows] > 0) | (self.index.places["ssd"][rows] > 0)
        return rows[: _leading(is_below.tolist())].tolist()  # type: ignore[no-any-return]

    def present(self, names: Sequence[BlockHash]) -> list[int]:
        """The same, in whatever tiers."""
        if not names or self.index.find(names[0]) == NO_ROW:
            return []
        rows = self.index.table.find_all(names)
        return rows[: _leading(self.index.are_present(rows).tolist())].tolist()  # type: ignore[no-any-return]

    def take_changed(self) -> list[BlockHash]:
        """Of those that went at once, CHANGED_MAX at one time: `is_more_changed` says whether there are more."""
        if not (self._changed or self._gone or self._gone_words):
            return []  # most steps
        rows = np.fromiter(self._changed, np.int64, len(self._changed))
        names = [*self._gone, *self.index.table.names(rows)]
        self._changed.clear()
        self._gone.clear()
        if self._gone_words:
            words = self._gone_words.pop()
            names += names_of(words[:CHANGED_MAX])
            if len(words) > CHANGED_MAX:
                self._gone_words.append(words[CHANGED_MAX:])
        return names

    @property
    def is_more_changed(self) -> bool:
        return bool(self._gone_words)

    def state(self, tier: LowerTier) -> TierState:
        total, blocks = self.slots[tier].total, self.index.counts[tier]
        retained = sum(self.index.is_in(row, tier) for row in self.promises)
        sizes = blocks * self.row_bytes, total * self.row_bytes, retained * self.row_bytes
        off_reason = self.ssd_off_reason if tier == "ssd" else ""
        return TierState(tier, blocks, total, *sizes, off_reason, self.stored_blocks[tier] * self.row_bytes)

    def check_integrity(self, in_use: dict[LowerTier, list[Slot]]) -> None:
        """`in_use`: slots that something on its way has taken."""
        self.index.check_integrity()
        self.promises.check_integrity()
        assert all(self.index.is_marked(row, Mark.PINNED) for row in self._pins)
        for tier in LOWER:
            places = self.index.places[tier][: self.index.table.rows_used + 1]
            held = [Slot(place - 1) for place in places[places > 0].tolist()]
            self.slots[tier].check_integrity([*held, *in_use[tier]])


def _leading(flags: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return flags.index(False) if False in flags else len(flags)
