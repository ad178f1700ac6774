"""The I/O of a worker's lower tiers: copies down, copies up, and what the file has to be told, by two threads."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from baton.ids import BlockId
from baton.layout import KVLayout
from kvcache.tiers.interface import BlockCopier, LowerTier, Slot, SlotHeader
from kvcache.tiers.io.interface import IoSizes, PoolDigests, RestorePart, RowMemory, SlotIo, VerifyDdr
from kvcache.tiers.io.job import Job
from kvcache.tiers.io.offload import Offload
from kvcache.tiers.io.restore import RestoreJob
from kvcache.tiers.io.restore_copies import RestoreCopies
from kvcache.tiers.io.restore_pieces import RestorePiece, plan_restore
from kvcache.tiers.io.speeds import TierSpeeds
from kvcache.tiers.io.threads import THREADS, IoThreads, Piece, Urgency, closed, failure_of
from kvcache.tiers.rows.codec import Codec
from kvcache.tiers.rows.staging import Staging

T = TypeVar("T")
LeaveDisk = Callable[[], None]
CLOSE_S = 2.0
"""What `close` waits for a disk that does not answer."""
ERASE_SLOTS = 256
"""In one turn at the disk: a page each."""


class TierIo:
    """For the engine's thread, which owns slots and blocks: what it gives to a job is the job's until that has ended.

    Restores go first, then copies down, then what is written to the disk, in the order asked for. What goes down takes
    part in `bytes_in_flight` from the call until it has ended, and the caller asks `has_room_for` before. Restores
    are bounded by the blocks of the pool that they fill.
    """

    def __init__(
        self,
        copier: BlockCopier,
        ddr: RowMemory,
        file: SlotIo | None,
        codec: Codec | None,
        digests: PoolDigests,
        layout: KVLayout,
        bytes_in_flight_max: int,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        verify_ddr: VerifyDdr = "sampled",
        pin: Callable[[memoryview], None] | None = None,
        sizes: IoSizes = IoSizes(),  # noqa: B008 - frozen
    ) -> None:
        """`ddr` and `file` stay the caller's, who closes them after this. `wake` is called in an I/O thread when a job
        has ended or a restore has got on. `pin` is HostMemory's."""
        self._file, self._layout, self._verify_ddr = file, layout, verify_ddr
        self._ddr, self._sizes = ddr, sizes
        self._row_bytes = codec.stored_bytes if codec else layout.block_bytes
        self._bytes_max = bytes_in_flight_max
        self._wake, self._clock = wake, clock
        self._lock = threading.Lock()
        self._bytes_in_flight = 0
        self.down_s: dict[LowerTier, float] = {"ddr": 0.0, "ssd": 0.0}
        """How long copies down into each tier have taken, all together."""
        self._restores: set[RestoreJob] = set()
        arenas = (THREADS + 1) * (
            2 if codec else 1
        )  # for the engine's thread too; one to read into, one to decode into
        self._staging = Staging(arenas, max(self._row_bytes, layout.block_bytes), sizes.staging_bytes, pin)
        self._offload = Offload(copier, ddr.rows, codec, layout, self._staging)
        self._copies = RestoreCopies(copier, ddr, file, codec, digests, self._staging)
        self.speeds = TierSpeeds()
        self._scans: dict[Job[None], threading.Thread] = {}
        self._threads = IoThreads()

    # ---- down

    @property
    def bytes_in_flight(self) -> int:
        """On their way down: HBM's as they are, DDR's as they are stored."""
        return self._bytes_in_flight

    def has_room_for(self, size_bytes: int) -> bool:
        return self._bytes_in_flight + size_bytes <= self._bytes_max

    def offload(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> Job[list[int | None]]:
        """HBM to DDR. The result: digests as SlotHeader has them, with `digests` where they are known; None of a block
        that cannot be stored compressed."""
        result: list[int | None] = [None] * len(blocks)

        def copy(some: slice, _: LeaveDisk) -> None:
            result[some] = self._copy_down(blocks[some], slots[some], digests[some])

        return self._down(Urgency.OFFLOAD, len(blocks), self._layout.block_bytes, copy, result)

    def offload_now(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> list[int | None]:
        """The same, on the caller's thread."""
        return self._copy_down(blocks, slots, digests)

    def _copy_down(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> list[int | None]:
        with self._timed("ddr"):
            return self._offload.copy(blocks, slots, digests)

    def demote(self, ddr_slots: Sequence[Slot], ssd_slots: Sequence[Slot], headers: Sequence[SlotHeader]) -> Job[None]:
        """DDR to SSD. Adjacent SSD slots are written by one call."""
        file = self._file
        assert file is not None and len(ddr_slots) == len(ssd_slots) == len(headers)

        def write(some: slice, _: LeaveDisk) -> None:
            with self._timed("ssd"):
                file.write(ssd_slots[some], headers[some], self._ddr.rows, ddr_slots[some])

        return self._down(Urgency.DISK_WRITE, len(ddr_slots), self._row_bytes, write, None)

    @contextmanager
    def _timed(self, tier: LowerTier) -> Iterator[None]:
        began_s = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self.down_s[tier] += self._clock() - began_s

    def erase(self, ssd_slots: Sequence[Slot]) -> Job[None]:
        """Before what is written later to these slots."""
        file = self._file
        assert file is not None

        def erase(some: slice, _: LeaveDisk) -> None:
            file.erase(ssd_slots[some])

        return self._submit(Urgency.DISK_WRITE, slices(len(ssd_slots), ERASE_SLOTS), erase, None, 0)

    def run(self, work: Callable[[], T], needs_disk: bool = True) -> Job[list[T]]:
        """Something short, after what goes down. The result: one value."""
        result: list[T] = []

        def call(_: slice, __: LeaveDisk) -> None:
            result.append(work())

        urgency = Urgency.DISK_WRITE if needs_disk else Urgency.OFFLOAD
        return self._submit(urgency, [slice(0, 1)], call, result, 0)

    def scan(self, found: Callable[[Slot, SlotHeader], None]) -> Job[None]:
        """Tells what lies in the file, in a thread of its own, as it is one long call; gives way to all others that
        wait for the disk. `found` is called in that thread."""
        file = self._file
        assert file is not None
        job: Job[None] = Job(None, 1, nothing, self._wake)

        def scan() -> None:
            job.piece_ended(failure_of(partial(file.scan, found, lambda: not self._threads.give_way())))

        thread = threading.Thread(target=scan, name="kv-scan", daemon=True)
        self._scans = {job: thread} | {other: at for other, at in self._scans.items() if not other.is_done}
        thread.start()
        return job

    # ---- up

    def restore(self, parts: Sequence[RestorePart]) -> RestoreJob:
        """Blocks of one run, in its order."""
        turn = self._threads.next_turn()
        plan = plan_restore(parts, self._layout, self._sizes, self._staging.slots, self._verify_ddr, turn)
        job = RestoreJob(plan, self.speeds, self._clock, self._wake, partial(self._threads.discard, turn))
        with self._lock:
            self._restores = {other for other in self._restores if other.result is None} | {job}
        self._threads.submit(self._restore_piece(job, turn, at, piece) for at, piece in enumerate(plan.pieces))
        return job

    def _restore_piece(self, job: RestoreJob, turn: int, number: int, piece: RestorePiece) -> Piece:
        def ended(error: OSError | None) -> None:
            if error:
                job.lost(piece.positions, f"The restore failed: {error.strerror or error}.")
            job.piece_ended()

        run = partial(self._copies.run, job, piece)
        return Piece(Urgency.RESTORE, turn, number, run, ended, needs_disk=piece.tier == "ssd")

    # ---- the end

    def close(self) -> bool:
        """Cancels restores, fails what waits and ends the threads. False: one is stuck in the disk, and what it reads
        or writes must stay mapped and open."""
        for restore in self._restores:
            restore.cancel()
        has_ended = self._threads.close(CLOSE_S)
        for job, thread in self._scans.items():
            thread.join(CLOSE_S)
            job.piece_ended(closed())  # if it has not ended by itself
            has_ended &= not thread.is_alive()
        if has_ended:
            self._staging.close()
        return has_ended

    # ---- jobs in pieces

    def _down(
        self, urgency: Urgency, rows: int, row_bytes: int, work: Callable[[slice, LeaveDisk], None], result: T
    ) -> Job[T]:
        assert self.has_room_for(rows * row_bytes), "the caller asks before"
        some = slices(rows, max(1, self._sizes.piece_bytes // row_bytes))
        return self._submit(urgency, some, work, result, rows * row_bytes)

    def _submit(
        self,
        urgency: Urgency,
        cuts: Iterator[slice] | Sequence[slice],
        work: Callable[[slice, LeaveDisk], None],
        result: T,
        size_bytes: int,
    ) -> Job[T]:
        cuts = list(cuts)
        job = Job(result, len(cuts), partial(self._count, -size_bytes), self._wake)
        turn = self._threads.next_turn()

        def run(some: slice, leave_disk: LeaveDisk) -> None:
            if job.error is None:
                work(some, leave_disk)

        self._count(size_bytes)
        needs_disk = urgency is Urgency.DISK_WRITE
        self._threads.submit(
            Piece(urgency, turn, i, partial(run, some), job.piece_ended, needs_disk) for i, some in enumerate(cuts)
        )
        return job

    def _count(self, size_bytes: int) -> None:
        with self._lock:
            self._bytes_in_flight += size_bytes


def slices(count: int, size: int) -> Iterator[slice]:
    """Of at most `size` each."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def nothing() -> None:
    pass
