"""The prefix index: how long a prefix of a prompt lies on which worker, in which tier.

It is what the workers' KV events say, and what this router itself sent where and has not been told of yet. Pure: no
I/O, an injected clock. router/index/feed.py feeds it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from baton.clock import Clock, monotonic
from baton.cluster.cache_events import CacheEvents
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from router.index.block_table import BlockTable, Column, Keys, column_numbers, keys_of
from router.index.block_table import PrefixLength as PrefixLength
from router.index.expectations import Expectations
from router.index.member import Doubt as Doubt
from router.index.member import Freshness as Freshness
from router.index.member import Member

EXPECT_S = 30.0
"""How long a block that was sent for stays expected: longer than a prompt may take to be computed, mostly."""
SLOT_LISTS_MAX = 1024
"""Sets of columns whose slots are remembered."""
Slots = NDArray[np.intp]


class Applied(Enum):
    APPLIED = "applied"
    DUPLICATE = "duplicate"
    """Known already, by a batch or a snapshot; nothing changed."""
    GAP = "gap"
    """Batches are missing before this one. What it says is believed, but the worker is stale until `restore`."""
    FOREIGN = "foreign"
    """Of an epoch or a worker that is not joined; nothing changed."""


class PrefixIndex:
    """Blocks by worker and tier. A worker is known here by its *slot*, a small number that is its own from `join`
    until `leave`.

    A stale worker's blocks stay, as belief, and what this router sends there stays expected for as long as it is
    stale. Past `blocks_max` nothing new is learned: a worker of which something was refused is stale until a
    snapshot fits. Single-threaded; `tidy` must be called now and then.
    """

    def __init__(self, blocks_max: int, clock: Clock = monotonic, expect_s: float = EXPECT_S) -> None:
        self._table, self._blocks_max = BlockTable(blocks_max), blocks_max
        self._clock = clock
        self._expectations = Expectations(expect_s)
        self._members: dict[WorkerId, Member] = {}
        self._free_slots: list[int] = []
        self._columns = 0
        """The lowest bit of each member's column."""
        self._slot_of_column: dict[int, int] = {}
        self._slots: dict[int, Slots] = {}
        self._slot_row: Slots | None = None
        """`_slot_of_column` as an array, while nothing changed."""
        self._latest: tuple[Sequence[BlockHash], int, Keys] = ((), 0, keys_of(b""))

    # ---- members

    def join(self, worker_id: WorkerId, epoch: str) -> int:
        """Its slot. Idempotent; another epoch is another life of the worker, whose cache is empty."""
        member = self._members.get(worker_id)
        if member is not None and member.epoch == epoch:
            return member.slot
        if member is None:
            slot = self._free_slots.pop(0) if self._free_slots else len(self._members)
        else:
            slot = member.slot
            self._let_go(member)
        self._members[worker_id] = member = Member(worker_id, epoch, slot, self._table.open_column())
        member.doubts[Doubt.NO_SNAPSHOT] = self._clock()
        self._use(member.column, slot)
        return slot

    def leave(self, worker_id: WorkerId) -> None:
        """Forgets the worker; idempotent."""
        if member := self._members.pop(worker_id, None):
            self._let_go(member)
            self._free_slots.append(member.slot)

    def slot_of(self, worker_id: WorkerId) -> int | None:
        member = self._members.get(worker_id)
        return member.slot if member else None

    def sequence_of(self, worker_id: WorkerId) -> int | None:
        """Of the last batch that is known with all before it; None without a snapshot."""
        member = self._members.get(worker_id)
        return member.sequence if member else None

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._members

    # ---- what workers tell

    def apply(self, worker_id: WorkerId, events: CacheEvents) -> Applied:
        member = self._members.get(worker_id)
        if member is None or member.epoch != events.epoch:
            return Applied.FOREIGN
        if member.sequence is not None and events.sequence <= member.sequence:
            return Applied.DUPLICATE
        self._change(member, events)
        if member.sequence is None or events.sequence > member.sequence + 1:
            self.doubt(worker_id, Doubt.EVENTS_MISSING)
            return Applied.GAP
        member.sequence = events.sequence
        return Applied.APPLIED

    def restore(
        self, worker_id: WorkerId, epoch: str, sequence: int, blocks: Mapping[Tier, Iterable[BlockHash]]
    ) -> None:
        """A snapshot, all at once; see `begin_restore`."""
        restoration = self.begin_restore(worker_id, epoch)
        for tier, names in blocks.items():
            restoration.add(tier, b"".join(names))
        restoration.finish(sequence)

    def begin_restore(self, worker_id: WorkerId, epoch: str) -> "Restoration":
        """For a snapshot that comes in pieces. Until it is finished the index says what it said before."""
        return Restoration(worker_id, epoch, self._table, self._finish)

    def _change(self, member: Member, events: CacheEvents) -> None:
        for changed in (events.stored, events.moved):
            for tier, names in changed.items():
                if self._table.store(member.column, tier, names):
                    self.doubt(member.worker_id, Doubt.INDEX_FULL)
        if events.removed:
            self._table.remove(member.column, events.removed)

    def _finish(self, restoration: "Restoration", sequence: int) -> bool:
        member = self._members.get(restoration.worker_id)
        if member is None or member.epoch != restoration.epoch:
            self._table.close_column(restoration.column)
            return False
        self._drop(member.column)
        member.column, member.sequence = restoration.column, sequence
        self._use(member.column, member.slot)
        member.doubts.pop(Doubt.NO_SNAPSHOT, None)
        member.doubts.pop(Doubt.EVENTS_MISSING, None)
        member.doubts.pop(Doubt.INDEX_FULL, None)
        if restoration.refused:
            self.doubt(member.worker_id, Doubt.INDEX_FULL)
        for keys in self._expectations.of(member, self._clock()):
            self._table.expect([member.column], keys)
        return True

    # ---- what this router sends

    def expect(self, worker_ids: Iterable[WorkerId], names: Sequence[BlockHash]) -> None:
        """These blocks will be on these workers soon: they count as if they were, in HBM, until an event says where
        they are, or for a while. Members only; others are ignored."""
        members = [member for worker_id in worker_ids if (member := self._members.get(worker_id))]
        if members and names:
            keys = self._keys(names)
            self._table.expect([member.column for member in members], keys)
            self._expectations.add(self._clock(), members, keys)
        self._forget_expired(limit=4)

    # ---- looking up

    def match(self, names: Sequence[BlockHash]) -> Mapping[int, PrefixLength]:
        """By slot, for each worker that holds the first of these blocks: how long a prefix it holds."""
        found: dict[int, PrefixLength] = {}
        for slots, length in self.holders(names):
            found.update(dict.fromkeys(slots.tolist(), length))
        return found

    def holders(self, names: Sequence[BlockHash]) -> list[tuple[Slots, PrefixLength]]:
        """The same, those together that hold the same."""
        return [
            (self._slots_of(columns), length) for columns, length in self._table.match(self._keys(names), self._columns)
        ]

    # ---- freshness

    def freshness(self, worker_id: WorkerId) -> Freshness:
        """Of a member."""
        return self._members[worker_id].freshness

    def doubt(self, worker_id: WorkerId, reason: Doubt) -> None:
        """A doubt that stands already keeps its time. Strangers are ignored."""
        if member := self._members.get(worker_id):
            member.doubts.setdefault(reason, self._clock())

    def trust(self, worker_id: WorkerId, reason: Doubt) -> None:
        """The doubt is gone."""
        if member := self._members.get(worker_id):
            member.doubts.pop(reason, None)

    def stale(self) -> dict[WorkerId, Freshness]:
        """Every member that is in doubt."""
        return {worker_id: member.freshness for worker_id, member in self._members.items() if member.doubts}

    # ---- upkeep

    def tidy(self) -> bool:
        """A slice of what is to be cleared away: about 4 ms at 4 million blocks. True while there is more."""
        has_more = self._forget_expired(limit=16)
        return self._table.sweep() or has_more

    def __len__(self) -> int:
        """Blocks known, on however many workers."""
        return len(self._table)

    @property
    def has_room(self) -> bool:
        """Whether a snapshot that did not fit might fit now."""
        return len(self) < 0.9 * self._blocks_max

    @property
    def size_bytes(self) -> int:
        return self._table.size_bytes + 40 * self._expectations.blocks

    def _forget_expired(self, limit: int) -> bool:
        for _ in range(limit):
            expectation = self._expectations.pop_due(self._clock())
            if expectation is None:
                return False
            for member in expectation.members:
                if member.is_here:
                    self._table.unexpect(member.column, expectation.keys)
        return True

    # ---- inside

    def _keys(self, names: Sequence[BlockHash]) -> Keys:
        """Placing a request looks up its names, then expects them: the second time they are known."""
        latest, length, keys = self._latest
        if latest is not names or length != len(names):
            keys = keys_of(b"".join(names))
            self._latest = (names, len(names), keys)
        return keys

    def _use(self, column: Column, slot: int) -> None:
        self._columns |= column.one
        self._slot_of_column[column.number] = slot
        self._forget_slots()

    def _drop(self, column: Column) -> None:
        self._columns &= ~column.one
        del self._slot_of_column[column.number]
        self._forget_slots()
        self._table.close_column(column)

    def _let_go(self, member: Member) -> None:
        member.is_here = False
        self._drop(member.column)

    def _slots_of(self, columns: int) -> Slots:
        slots = self._slots.get(columns)
        if slots is None:
            if self._slot_row is None:
                self._slot_row = np.zeros(max(self._slot_of_column) + 1, np.intp)
                self._slot_row[list(self._slot_of_column)] = list(self._slot_of_column.values())
            if len(self._slots) >= SLOT_LISTS_MAX:
                self._slots.clear()
            slots = self._slots[columns] = self._slot_row[column_numbers(columns)]
        return slots

    def _forget_slots(self) -> None:
        self._slots.clear()
        self._slot_row = None

    def check_integrity(self) -> None:
        """Asserts that everything agrees with everything. O(blocks)."""
        self._table.check_integrity()
        columns = [member.column for member in self._members.values()]
        assert sum(column.one for column in columns) == self._columns
        slots = [member.slot for member in self._members.values()]
        assert sorted([*slots, *self._free_slots]) == list(range(len(slots) + len(self._free_slots)))
        assert self._slot_of_column == {member.column.number: member.slot for member in self._members.values()}


class Restoration:
    """A snapshot on its way into the index, in a column of its own. Either `finish` or `abandon` ends it."""

    def __init__(
        self,
        worker_id: WorkerId,
        epoch: str,
        table: BlockTable,
        on_finish: Callable[["Restoration", int], bool],
    ) -> None:
        self.worker_id, self.epoch, self.column = worker_id, epoch, table.open_column()
        self._table, self._on_finish = table, on_finish
        self.refused = 0
        """Blocks that were not learned for want of room."""

    def add(self, tier: Tier, names: bytes) -> None:
        """Packed names."""
        self.refused += self._table.store(self.column, tier, names)

    def finish(self, sequence: int) -> bool:
        """The snapshot takes the place of what was known. False if the worker left or began a new life meanwhile."""
        return self._on_finish(self, sequence)

    def abandon(self) -> None:
        self._table.close_column(self.column)
