"""DDR to SSD when DDR runs full, and what is to be erased there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.index.worth import Worth
from kvcache.tiers.interface import Slot
from kvcache.tiers.moves.room import CHAIN, Room
from kvcache.tiers.moves.store_io import Job, StoreIo

LOW_DIVISOR: Final = 32
"""When fewer than one in so many of DDR's slots are free, room is made until half as many more are: what HBM evicts at
one time should find a slot."""
LOW_MIN: Final = 16
"""No fewer than so many, in a DDR that has eight times as many."""
BATCH: Final = 16
"""Blocks that are sent down at one time at least: a fraction of a millisecond."""
ERASED_MAX: Final = 4096
ROOM_DIVISOR: Final = 8


@dataclass(frozen=True, slots=True)
class Demotion:
    """Blocks that lie in DDR until this has ended, or longer."""

    job: Job[None]
    rows: tuple[int, ...]
    ddr_slots: tuple[Slot, ...]
    ssd_slots: tuple[Slot, ...]
    keeps_ddr: bool
    """A backup."""


@dataclass(slots=True)
class Batch:
    """What is to go down in one job."""

    rows: list[int]
    ssd_slots: list[Slot]


class Demotions:
    def __init__(self, shelves: Shelves, io: StoreIo, worth: Worth, bytes_max: int) -> None:
        """`bytes_max`: in flight, of all that goes down."""
        self._shelves, self._io, self._worth, self._bytes_max = shelves, io, worth, bytes_max
        self.room = Room(shelves, worth)
        ddr_slots = shelves.slots["ddr"].total
        self._low = max(1, ddr_slots // LOW_DIVISOR, min(LOW_MIN, ddr_slots // 8))
        self._high = self._low + max(1, self._low // 2)
        self.under_way: list[Demotion] = []
        self._erasing: list[tuple[Job[None], list[Slot]]] = []
        self.arrived = 0
        """Blocks that have been sent into DDR since room was made last."""
        self.is_scanned = False
        """Until then nobody knows which slots are free."""

    @property
    def has_room_below(self) -> bool:
        """The SSD takes everything."""
        slots = self._shelves.slots["ssd"]
        return self._shelves.has_ssd and self.is_scanned and slots.free > slots.total // ROOM_DIVISOR

    @property
    def free_wanted(self) -> int:
        """Slots of DDR that are kept free for what HBM evicts."""
        return self._high

    @property
    def erasing(self) -> list[Slot]:
        return [slot for _, slots in self._erasing for slot in slots]

    @property
    def is_busy(self) -> bool:
        return bool(self.under_way or self._erasing or self._shelves.slots["ssd"].to_erase)

    # ---- what has ended

    def take_in(self) -> None:
        ended = [demotion for demotion in self.under_way if demotion.job.is_done]
        self.under_way = [demotion for demotion in self.under_way if not demotion.job.is_done]
        for demotion in ended:
            error = demotion.job.error
            self._shelves.slots["ddr"].let_go(demotion.ddr_slots)
            for row, ddr_slot, ssd_slot in zip(demotion.rows, demotion.ddr_slots, demotion.ssd_slots, strict=True):
                self._land(row, ddr_slot, ssd_slot, error is None, demotion.keeps_ddr)
            if error is not None:
                self._shelves.turn_off_ssd(f"it could not be written ({error.strerror or error}).")
        for job, slots in [erasure for erasure in self._erasing if erasure[0].is_done]:
            self._erasing.remove((job, slots))
            if job.error is None:
                self._shelves.slots["ssd"].erased(slots)
            else:
                self._shelves.slots["ssd"].to_erase += slots
                self._shelves.turn_off_ssd(f"it could not be erased ({job.error.strerror or job.error}).")

    def _land(self, row: int, ddr_slot: Slot, ssd_slot: Slot, is_written: bool, keeps_ddr: bool) -> None:
        """If it still lies in DDR; else it was forgotten meanwhile, and the disk is to forget it too."""
        index = self._shelves.index
        is_still_there = (
            index.is_marked(row, Mark.MOVING) and index.is_in(row, "ddr") and index.place(row, "ddr") == ddr_slot
        )
        if is_still_there and is_written and self._shelves.has_ssd:
            self._shelves.put_down(row, "ssd", ssd_slot)
            if not keeps_ddr:
                self._shelves.drop(row, "ddr")
        else:
            self._shelves.slots["ssd"].give_back(ssd_slot, erase=True)
        if is_still_there:
            index.mark(row, Mark.MOVING, False)

    def erase(self) -> None:
        """Begins with what is to be erased, once it has been scanned: so many at one time that freeing them takes
        milliseconds."""
        slots = self._shelves.slots["ssd"]
        if slots.to_erase and not self._erasing and self._shelves.has_ssd and self.is_scanned:
            some = slots.to_erase[-ERASED_MAX:]
            del slots.to_erase[-ERASED_MAX:]
            self._erasing.append((self._io.erase(some), some))

    # ---- making room in DDR

    def make_room(self, now_s: float) -> None:
        """Sends the least valuable leaves down when DDR runs full, with what they alone hang on: a few, or twice as
        many as have come meanwhile. Where the SSD is nearly full, nothing has a place in both while other blocks are
        dropped."""
        count, self.arrived = max(BATCH, 2 * self.arrived), 0
        self.room.draw_again()
        on_their_way = sum(len(demotion.rows) for demotion in self.under_way if not demotion.keeps_ddr)
        free = self._shelves.slots["ddr"].free + on_their_way
        if free >= self._low:
            return
        short, batch = min(count, self._high - free), Batch([], [])
        if not self.has_room_below:
            short -= self.room.shed(self._shelves.slots["ddr"].free + short, now_s)
        room = self._room()
        for row, value in self._victims(short, now_s):
            length = min(CHAIN, short, room - len(batch.rows))
            if length <= 0:
                break
            chain = self._shelves.index.chain(row, "ddr", length)
            short -= self._send_down(chain, value, batch, now_s)
        self._submit(batch)

    def _room(self) -> int:
        """So many blocks may go down now."""
        if not self._shelves.has_ssd:
            return self._high
        return (self._bytes_max - self._io.bytes_in_flight) // self._shelves.row_bytes

    def _victims(self, count: int, now_s: float) -> Iterator[tuple[int, float]]:
        """Copies of what HBM is not about to evict come first: they can be made again."""
        leaves, others = self._shelves.index.leaves.of["ddr"], []
        for row, value in self._worth.weakest("ddr", now_s, count):
            if not self.room.is_redundant(row):
                others.append((row, value))
            elif row in leaves:
                yield row, value
        yield from ((row, value) for row, value in others if row in leaves)

    def _send_down(self, chain: Sequence[int], value: float, batch: Batch, now_s: float) -> int:
        """The chain's leaf comes first. How many slots of DDR are free for it, or will be."""
        index = self._shelves.index
        lacking = []
        for row in chain:
            if index.is_in(row, "ssd") or self.room.is_redundant(row):
                self._shelves.drop(row, "ddr")
            else:
                lacking.append(row)
        if index.is_marked(chain[0], Mark.PROMISED) or not self.room.is_bare(chain[0]):
            value = inf  # what blocks on the SSD hang on is worth no less than the weakest of them
        written = self._write(lacking, value, batch, now_s)
        kept = 0
        for row in lacking[: len(lacking) - written]:
            if kept or not self._may_be_lost(row):
                kept += 1
            else:
                self._shelves.let_drop(row, "ddr")
        return len(chain) - kept

    def _may_be_lost(self, row: int) -> bool:
        """For want of room below: not what was promised, nor what blocks on the SSD hang on."""
        if self._shelves.has_ssd and not self.is_scanned:
            return False  # there may be room soon
        return self.room.is_bare(row) and not self._shelves.index.is_marked(row, Mark.PROMISED)

    def _write(self, lacking: Sequence[int], value: float, batch: Batch, now_s: float) -> int:
        """Adds to the batch what the SSD has room for, or less valuable blocks: the chain's head rather than its tail.
        How many."""
        if not lacking or not self._shelves.has_ssd or not self.is_scanned:
            return 0
        slots = self.room.ssd_slots(len(lacking), value, now_s)
        rows = list(reversed(lacking))[: len(slots)]
        for row in rows:
            self._shelves.index.mark(row, Mark.MOVING, True)
        batch.rows += rows
        batch.ssd_slots += slots
        return len(rows)

    def back_up(self, rows: list[int]) -> None:
        """Copies of these, which lie in DDR alone, to free slots of the SSD, of which there are as many."""
        slots = self._shelves.slots["ssd"].take(len(rows))
        assert len(slots) == len(rows)
        for row in rows:
            self._shelves.index.mark(row, Mark.MOVING, True)
        self._submit(Batch(rows, slots), keeps_ddr=True)

    def _submit(self, batch: Batch, keeps_ddr: bool = False) -> None:
        if not batch.rows:
            return
        index = self._shelves.index
        ddr_slots = [Slot(index.place(row, "ddr")) for row in batch.rows]
        self._shelves.slots["ddr"].hold(ddr_slots)
        job = self._io.demote(ddr_slots, batch.ssd_slots, [self._shelves.header(row) for row in batch.rows])
        self.under_way.append(Demotion(job, tuple(batch.rows), tuple(ddr_slots), tuple(batch.ssd_slots), keeps_ddr))
