"""An I/O of the tiers in memory, whose jobs end when they are told to, and which sees whether slots and blocks are left
alone while they are a job's. A block's content is one number, and that is its digest too."""

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from baton.ids import BlockHash, BlockId
from kvcache.tiers.interface import LowerTier, Restored, RestoreTiming, Slot, SlotHeader
from kvcache.tiers.io.interface import RestorePart

T = TypeVar("T")


def content_of(name: BlockHash) -> int:
    return int.from_bytes(name[:8], "little") ^ 0xC0FFEE


class FakeJob(Generic[T]):
    def __init__(self, work: Callable[[], T], ended: Callable[[], None], size_bytes: int) -> None:
        self._work, self._ended, self.size_bytes = work, ended, size_bytes
        self.is_done = False
        self.error: OSError | None = None
        self._result: list[T] = []

    @property
    def result(self) -> T:
        return self._result[0]

    def wait(self, timeout_s: float) -> bool:  # noqa: ARG002 - it ends when it is told to
        return self.is_done

    def end(self, error: OSError | None = None) -> None:
        assert not self.is_done
        self.is_done, self.error = True, error
        self._ended()
        if error is None:
            self._result.append(self._work())


@dataclass
class FakeRestore:
    io: "FakeIo"
    parts: tuple[RestorePart, ...]
    result: Restored | None = None
    corrupt: set[int] = field(default_factory=set)
    has_disk_failed: bool = False
    layers: int = 0
    left_s: float = 0.0

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        raise NotImplementedError

    def wait(self, timeout_s: float) -> Restored | None:  # noqa: ARG002 - it ends when it is told to
        return self.result

    def cancel(self) -> None:
        if self.result is None:
            self._end(0, "It was given up, as whoever wanted it has gone or computes it sooner.")

    def end(self, error: OSError | None = None) -> None:
        """Copies up what is right."""
        for at, part in enumerate(self.parts):
            if error is not None and part.tier == "ssd":
                self.has_disk_failed = True
                return self._end(at, "The SSD could not be read.")
            if self.io.holds(part) != part.digest or part.digest is None:
                self.corrupt.add(at)
                return self._end(at, "A block was not what was stored.")
            self.io.pool[part.block] = part.digest
        return self._end(len(self.parts), "")

    def _end(self, good: int, reason: str) -> None:
        digests = tuple(part.digest for part in self.parts[:good] if part.digest is not None)
        self.result = Restored(good, digests, (RestoreTiming("ddr", good, 1.0),), reason)
        self.io.restores.remove(self)


class FakeIo:
    """Implements StoreIo. `ssd` may be given to the next one: that is what stays on the disk."""

    def __init__(
        self, pool_blocks: int, ssd: dict[Slot, tuple[SlotHeader, int]] | None = None, row_bytes: int = 100
    ) -> None:
        self.pool = [0] * pool_blocks
        self.ddr: dict[Slot, int] = {}
        self.ssd: dict[Slot, tuple[SlotHeader, int]] = {} if ssd is None else ssd
        self.jobs: list[FakeJob[object]] = []
        self.restores: list[FakeRestore] = []
        self.row_bytes = row_bytes
        self.copied_now = 0
        self.down_s: dict[LowerTier, float] = {"ddr": 0.0, "ssd": 0.0}
        self._written: dict[LowerTier, set[Slot]] = {"ddr": set(), "ssd": set()}
        """Slots that a job is writing."""

    @property
    def bytes_in_flight(self) -> int:
        return sum(job.size_bytes for job in self.jobs)

    def holds(self, part: RestorePart) -> int | None:
        if part.tier == "ddr":
            return self.ddr[part.slot]
        header, content = self.ssd.get(part.slot, (None, 0))
        return content if header is not None and header.name == part.name else None

    # ---- StoreIo

    def offload(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> FakeJob[Sequence[int | None]]:
        before = [self.pool[block] for block in blocks]

        def work() -> Sequence[int | None]:
            assert before == [self.pool[block] for block in blocks], "a held block was overwritten"
            return self.offload_now(blocks, slots, digests)

        return self._begin(work, "ddr", slots, len(blocks) * self.row_bytes)

    def offload_now(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> list[int | None]:
        self._check_unread("ddr", slots)
        self.copied_now += len(blocks)
        for block, slot, digest in zip(blocks, slots, digests, strict=True):
            assert digest in (None, self.pool[block]), "the digest is another's"
            self.ddr[slot] = self.pool[block]
        return [self.pool[block] for block in blocks]

    def demote(
        self, ddr_slots: Sequence[Slot], ssd_slots: Sequence[Slot], headers: Sequence[SlotHeader]
    ) -> FakeJob[None]:
        before = [self.ddr[slot] for slot in ddr_slots]

        def work() -> None:
            assert before == [self.ddr[slot] for slot in ddr_slots], "a slot was overwritten while it was read"
            self._check_unread("ssd", ssd_slots)
            for slot, header, content in zip(ssd_slots, headers, before, strict=True):
                self.ssd[slot] = header, content

        return self._begin(work, "ssd", ssd_slots, len(ddr_slots) * self.row_bytes)

    def restore(self, parts: Sequence[RestorePart]) -> FakeRestore:
        assert not any(part.slot in self._written[part.tier] for part in parts)
        restore = FakeRestore(self, tuple(parts))
        self.restores.append(restore)
        return restore

    def erase(self, ssd_slots: Sequence[Slot]) -> FakeJob[None]:
        def work() -> None:
            self._check_unread("ssd", ssd_slots)
            for slot in ssd_slots:
                self.ssd.pop(slot, None)

        return self._begin(work, "ssd", ssd_slots, 0)

    def scan(self, found: Callable[[Slot, SlotHeader], None]) -> FakeJob[None]:
        left = sorted(self.ssd.items())

        def work() -> None:
            for slot, (header, _) in left:
                found(slot, header)

        return self._begin(work, "ssd", (), 0)

    def close(self) -> bool:
        for restore in tuple(self.restores):
            restore.cancel()
        for job in tuple(self.jobs):
            self.end(job, OSError(errno.ECANCELED, "The tiers were closed."))
        return True

    # ---- the test's side

    def end(self, job: FakeJob[object], error: OSError | None = None) -> None:
        self.jobs.remove(job)
        job.end(error)

    def end_all(self) -> None:
        for restore in tuple(self.restores):
            restore.end()
        for job in tuple(self.jobs):
            self.end(job)

    def _begin(self, work: Callable[[], T], tier: LowerTier, slots: Iterable[Slot], size_bytes: int) -> FakeJob[T]:
        slots = set(slots)
        assert not slots & self._written[tier], "two jobs write one slot"
        self._check_unread(tier, slots)
        self._written[tier] |= slots

        job = FakeJob(work, lambda: self._written[tier].difference_update(slots), size_bytes)
        self.jobs.append(job)  # type: ignore[arg-type]
        return job

    def _check_unread(self, tier: LowerTier, slots: Iterable[Slot]) -> None:
        read = {part.slot for restore in self.restores for part in restore.parts if part.tier == tier}
        assert not read & set(slots), "a slot that is read is overwritten"
