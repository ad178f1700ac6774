"""DDR and SSD to HBM: what runs, and what is learnt from how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.ids import BlockHash, BlockId
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.shelves import LOWER, Shelves
from kvcache.tiers.interface import LowerTier, Restored, Slot
from kvcache.tiers.io.interface import RestorePart
from kvcache.tiers.moves.store_io import RunningRestore, StoreIo


@dataclass(frozen=True, slots=True)
class Running:
    job: RunningRestore
    parts: tuple[RestorePart, ...]

    def slots(self, tier: LowerTier) -> list[Slot]:
        return [part.slot for part in self.parts if part.tier == tier]


class Restores:
    """A restore holds its slots: what is dropped meanwhile is overwritten later."""

    def __init__(self, shelves: Shelves, io: StoreIo) -> None:
        self._shelves, self._io = shelves, io
        self.running: list[Running] = []

    def begin(self, names: Sequence[BlockHash], blocks: Sequence[BlockId]) -> RunningRestore:
        """They all lie below HBM."""
        rows = self._shelves.index.table.find_all(names).tolist()
        parts = tuple(map(self._part, rows, names, blocks))
        running = Running(self._io.restore(parts), parts)
        for tier in LOWER:
            self._shelves.slots[tier].hold(running.slots(tier))
        self.running.append(running)
        return running.job

    def _part(self, row: int, name: BlockHash, block: BlockId) -> RestorePart:
        index = self._shelves.index
        tier = index.lower_tier_of(row)
        assert tier is not None, "not located"
        slot = Slot(index.place(row, tier))
        return RestorePart(tier, slot, name, index.digest_of(row), self._shelves.storage, block)

    def take_in(self) -> None:
        """What has ended."""
        ended = [(running, running.job.result) for running in self.running]
        self.running = [running for running, result in ended if result is None]
        for running, result in ended:
            if result is not None:
                self._settle(running, result)

    def _settle(self, running: Running, result: Restored) -> None:
        for tier in LOWER:
            self._shelves.slots[tier].let_go(running.slots(tier))
        for part in running.parts[: result.good]:
            self._came_up(part)
        for position in sorted(running.job.corrupt):
            self._forget(running.parts[position])
        if running.job.has_disk_failed:
            self._shelves.turn_off_ssd("it could not be read.")

    def _came_up(self, part: RestorePart) -> None:
        """HBM has the very bytes of the slot, if the block was published, and nobody had computed it before."""
        index = self._shelves.index
        row = index.find(part.name)
        if index.row_of_block(part.block) == row and index.lies_below(row):
            index.mark(row, Mark.FROM_BELOW, True)

    def _forget(self, part: RestorePart) -> None:
        """It was not what had been stored."""
        self._shelves.corrupt_blocks += 1
        index = self._shelves.index
        row = index.find(part.name)
        if index.is_in(row, part.tier) and index.place(row, part.tier) == part.slot:
            self._shelves.forget(row)
