"""The tiers below a worker's pool: what the engine sees of them, and in which order things happen.

index/ knows where blocks lie and what they are worth, moves/ has them go down, up and out, and takes in what an earlier
process left on the disk; all of that on the engine's thread, where only jobs are begun and ended ones taken in.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from baton.ids import BlockHash, BlockId, TenantTag
from baton.latency import Tier
from kvcache.eviction.interface import KeepPolicy
from kvcache.name_table import NO_ROW
from kvcache.tiers.index.coming import NOBODYS, Coming
from kvcache.tiers.index.hot_prefixes import hottest
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.index.sweeps import rows_below, rows_of
from kvcache.tiers.index.tenants import NO_TAG
from kvcache.tiers.index.use_counts import UseCounts
from kvcache.tiers.index.worth import Worth
from kvcache.tiers.interface import (
    HotPrefix,
    LowerTier,
    Owner,
    PoolView,
    Restore,
    RestoreTiming,
    Slot,
    StorageFormat,
    TierState,
)
from kvcache.tiers.moves.backups import Backups
from kvcache.tiers.moves.demotions import Demotions
from kvcache.tiers.moves.found_slots import FoundSlots
from kvcache.tiers.moves.offloads import Offloads
from kvcache.tiers.moves.restores import Restores
from kvcache.tiers.moves.store_io import Job, StoreIo
from kvcache.tiers.self_test import time_restores

DOUBTFUL_DIVISOR: Final = 16
"""Blocks may be dropped soon when fewer than one in so many of the lowest tier's slots are free, or a few."""
DOUBTFUL_MIN: Final = 32

SCAN_WAIT_S: Final = 2.0
SCAN_TURN_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class StoreShape:
    """How much there is of everything."""

    hbm_blocks: int
    ddr_slots: int
    ssd_slots: int
    block_bytes: int
    """In HBM."""
    row_bytes: int
    """Of a block below it."""
    storage: StorageFormat
    bytes_in_flight_max: int


class TierStore:
    """Implements LowerTiers. Takes over the I/O; `on_close` is called once its threads have ended."""

    def __init__(
        self,
        shape: StoreShape,
        io: Callable[[Callable[[], None]], StoreIo],
        policy: KeepPolicy,
        saved_s: Callable[[int], float],
        random: np.random.Generator,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_close: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`io` is given what to call when a job has ended. `saved_s`: what not computing a block at this depth again
        saves, less what bringing it up takes. `on_close`: whether the threads have ended."""
        self.wake: Callable[[], None] = lambda: None
        self._shape, self._clock, self._wall_clock = shape, clock, wall_clock
        self._on_close = on_close
        self._io = io(lambda: self.wake())
        self._shelves = Shelves(shape.hbm_blocks, shape.ddr_slots, shape.ssd_slots, shape.row_bytes, shape.storage)
        self._index = self._shelves.index
        self._worth = Worth(self._index, policy, saved_s, shape.row_bytes, random)
        self._use_counts = UseCounts(self._index, policy, shape.hbm_blocks)
        self._demotions = Demotions(self._shelves, self._io, self._worth, shape.bytes_in_flight_max)
        self._backups = Backups(self._shelves, self._demotions, shape.bytes_in_flight_max)
        self._offloads = Offloads(
            *(self._shelves, self._io, self._worth, self._demotions),
            *(shape.hbm_blocks, shape.bytes_in_flight_max),
        )
        self._restores = Restores(self._shelves, self._io)
        self._found = FoundSlots(self._shelves, lambda: self.wake())
        self._scan: Job[None] | None = self._io.scan(self._found.found) if shape.ssd_slots else None
        self._demotions.is_scanned = self._scan is None
        self._coming = Coming(BlockHash(b""), (), NOBODYS, {})
        self._removed: list[BlockId] = []
        self._pool: PoolView | None = None
        self._is_closed = False

    # ---- what the pool tells

    def stored(self, block: BlockId, name: BlockHash) -> None:
        self._forget_unflushed()
        is_coming = name in self._coming.depths
        row = NO_ROW if is_coming else self._index.find(name)
        if row == NO_ROW:
            row = self._coming.enter(self._index, name, self._clock())
        self._shelves.put(row, "hbm", block)
        if is_coming:
            del self._coming.depths[name]
            self._promise([row], self._coming.owner)
        self._offloads.is_due = True

    def removed(self, block: BlockId, name: BlockHash) -> None:  # noqa: ARG002 - the listener's signature
        if self._index.row_of_block(block) != NO_ROW:
            self._removed.append(block)

    def flush(self) -> None:
        if self._removed:
            removed, self._removed = self._removed, []
            self._offloads.flush(removed, self._clock())

    def _forget_unflushed(self) -> None:
        """Of a pool that gave blocks away without a flush: their content is gone."""
        for block in self._removed:
            self._shelves.let_drop(self._index.row_of_block(block), "hbm")
        self._removed.clear()

    # ---- what the engine tells

    def published(self, root: BlockHash, names: Sequence[BlockHash], first: int, owner: Owner) -> None:
        new = names[first:]
        if not new:
            return
        now_s = self._clock()
        self._use_counts.published(new, first, now_s)
        found = self._index.table.find_all(new) if len(new) > 1 else np.array([self._index.table.find(new[0])])
        are_present = self._index.are_present(found)
        rows = found[are_present]
        if len(rows):
            self._index.use(rows, now_s)
            self._promise(rows.tolist(), owner)
        is_new = (~are_present).tolist()
        depths = {name: depth for depth, name in enumerate(new, first) if is_new[depth - first]}
        self._coming = Coming(root, names, owner, depths)

    def used(self, names: Sequence[BlockHash], owner: Owner) -> None:
        rows = self._shelves.present(names)
        if rows:
            now_s = self._clock()
            self._use_counts.used(names[: len(rows)], 0, now_s)
            self._index.use(np.asarray(rows, np.int64), now_s)
            self._promise(rows, owner)
            self._offloads.is_due = True
            self._backups.look_again()

    def _promise(self, rows: Sequence[int], owner: Owner) -> None:
        if owner.pin or owner.ttl_s > 0:
            self._shelves.promises.give(rows, owner, self._wall_clock())

    def digested(self, names: Sequence[BlockHash], digests: Sequence[int]) -> None:
        """Of rows that are stored as they are; what lies below HBM already has its own."""
        if self._shape.storage != "none":
            return
        for name, digest in zip(names, digests, strict=True):
            row = self._index.find(name)
            if self._index.is_in(row, "hbm") and not self._index.lies_below(row):
                self._index.note_digest(row, digest)

    def pump(self, pool: PoolView) -> None:
        self._pool = pool
        self._demotions.room.spared.clear()
        self._forget_unflushed()
        self._take_in()
        if self._is_closed:
            return
        self._demotions.erase()
        now_s = self._clock()
        self._use_counts.tell_some(now_s)
        self._offloads.begin(pool, self._shape.block_bytes, now_s)
        self._demotions.make_room(now_s)
        if not self._restores.running:
            self._back_up()

    def _back_up(self) -> None:
        self._backups.begin(self._shape.bytes_in_flight_max - self._io.bytes_in_flight)
        if self._backups.is_looking and not self._demotions.under_way:
            self.wake()  # the end of a job wakes as well

    def _take_in(self) -> None:
        now_s, wall_s = self._clock(), self._wall_clock()
        self._restores.take_in()
        self._offloads.take_in(self._pool)
        self._demotions.take_in()
        self._shelves.expire(now_s, wall_s)
        if self._scan is not None:
            self._take_in_scanned(self._scan, now_s, wall_s)

    def _take_in_scanned(self, scan: Job[None], now_s: float, wall_s: float) -> None:
        is_done = scan.is_done  # asked first: what is found, is found before
        is_more = self._found.take_in(now_s, wall_s)
        if is_more or not is_done:
            if is_more:
                self.wake()
            return
        self._scan, self._demotions.is_scanned = None, True
        self._found.end()
        if scan.error is not None and not self._is_closed:
            self._shelves.turn_off_ssd(f"it could not be read ({scan.error.strerror or scan.error}).")

    # ---- what the engine asks

    def locate(self, names: Sequence[BlockHash]) -> Sequence[LowerTier]:
        rows = self._shelves.located(names)
        self._demotions.room.spared.update(rows)
        in_ddr = self._index.places["ddr"][rows] > 0
        return ["ddr" if is_in else "ssd" for is_in in in_ddr.tolist()]

    def restore(self, names: Sequence[BlockHash], blocks: Sequence[BlockId]) -> Restore:
        self._use_counts.coming_up(names)
        return self._restores.begin(names, blocks)

    def tier_of(self, name: BlockHash) -> Tier | None:
        return self._index.tier_of(self._index.find(name))

    def tenant_of(self, name: BlockHash) -> TenantTag | None:
        row = self._index.find(name)
        tag = self._index.tenants.tag(int(self._index.tenant[row]))
        return None if tag == NO_TAG else tag

    def changed(self) -> Sequence[BlockHash]:
        changed = self._shelves.take_changed()
        if self._shelves.is_more_changed:
            self.wake()
        return changed

    # ---- what operators and the cluster ask

    def note_copies(self, copies: Sequence[tuple[BlockHash, int]]) -> None:
        if not copies:
            return
        rows = self._index.table.find_all([name for name, _ in copies])
        is_present = self._index.are_present(rows)
        counts = np.array([count for _, count in copies], np.int64)
        self._index.note_copies(rows[is_present], counts[is_present])

    def doubtful(self, count: int) -> Sequence[BlockHash]:
        tier: LowerTier = "ssd" if self._shelves.has_ssd else "ddr"
        slots = self._shelves.slots[tier]
        if not self._demotions.is_scanned or slots.free >= max(DOUBTFUL_MIN, slots.total // DOUBTFUL_DIVISOR):
            return ()
        rows = self._worth.doubtful(tier, count, self._clock())
        return self._index.table.names(np.asarray(rows, np.int64))

    def pin(self, names: Sequence[BlockHash], until_s: float) -> None:
        rows = [row for name in names if (row := self._index.find(name)) != NO_ROW]
        self._shelves.pin(rows, until_s)

    def clear(self, tenant: TenantTag | None) -> tuple[int, int]:
        self._offloads.void(rows_of(self._index, tenant).tolist())
        for block in self._removed:  # the pool's part of this clearing
            self._shelves.drop(self._index.row_of_block(block), "hbm")
        self._removed.clear()
        rows = rows_below(self._index, tenant)
        copies = self._shelves.forget_many(rows)
        if self._scan is not None:
            self._found.clear(tenant)
        self._shelves.slots["ssd"].wipe_free()
        self.wake()
        return len(rows), copies * self._shape.row_bytes

    def states(self) -> Sequence[TierState]:
        tiers: list[LowerTier] = ["ddr", "ssd"] if self._shape.ssd_slots else ["ddr"]
        arriving = {
            "ddr": sum(len(offload.rows) for offload in self._offloads.under_way),
            "ssd": sum(len(demotion.rows) for demotion in self._demotions.under_way),
        }
        row_bytes = self._shape.row_bytes
        return [
            replace(
                self._shelves.state(tier), arriving_bytes=arriving[tier] * row_bytes, stored_s=self._io.down_s[tier]
            )
            for tier in tiers
        ]

    def hottest(self, count: int) -> Sequence[HotPrefix]:
        self._use_counts.tell(self._clock())
        return hottest(self._index, count)

    @property
    def dropped_blocks(self) -> int:
        return self._shelves.dropped_blocks

    @property
    def corrupt_blocks(self) -> int:
        return self._shelves.corrupt_blocks

    @property
    def is_settled(self) -> bool:
        """Nothing is on its way, and the disk has been scanned."""
        moving = self._offloads.under_way or self._restores.running or self._demotions.is_busy
        return not (moving or self._backups.is_looking) and self._scan is None

    def self_test(self) -> Sequence[RestoreTiming]:
        """The pool must be empty yet: what its first blocks hold is copied down and up again. Waits for the scan of the
        SSD, SCAN_WAIT_S at most; until it has ended that tier is not timed."""
        deadline_s = time.monotonic() + SCAN_WAIT_S
        while self._scan is not None and time.monotonic() < deadline_s:
            self._scan.wait(SCAN_TURN_S)
            self._take_in()
        shape = self._shape
        return time_restores(self._shelves, self._io, shape.hbm_blocks, shape.block_bytes, shape.bytes_in_flight_max)

    def check_integrity(self) -> None:
        """Asserts that no tier is over its limit, and that everything that was taken is somebody's. O(rows)."""
        taken: dict[LowerTier, list[Slot]] = {"ddr": [], "ssd": self._demotions.erasing}
        for offload in self._offloads.under_way:
            taken["ddr"] += offload.slots
        for demotion in self._demotions.under_way:
            taken["ssd"] += demotion.ssd_slots
        self._shelves.check_integrity(taken)
        assert self._index.counts["ddr"] <= self._shape.ddr_slots
        assert self._index.counts["ssd"] <= self._shape.ssd_slots
        assert self._io.bytes_in_flight <= self._shape.bytes_in_flight_max

    def close(self) -> None:
        """What is held of the pool is let go. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._found.close()
        has_ended = self._io.close()
        self._restores.take_in()
        self._offloads.take_in(self._pool)
        self._on_close(has_ended)
