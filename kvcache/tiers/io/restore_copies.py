"""Carries out the pieces of restores: reads, decodes, copies, verifies."""

from collections.abc import Callable, Sequence

from baton.digest import slice_digests, unsigned
from baton.ids import BlockId
from kvcache.tiers.interface import BlockCopier, Rows, Slot, SlotHeader
from kvcache.tiers.io.interface import PoolDigests, RowMemory, SlotIo
from kvcache.tiers.io.restore import CORRUPT, RestoreJob
from kvcache.tiers.io.restore_pieces import RestorePiece
from kvcache.tiers.rows.codec import Codec
from kvcache.tiers.rows.copier import places
from kvcache.tiers.rows.staging import Staging

BATCH_BYTES = 512 * 1024
"""Stored bytes that are digested at a time: they and what that takes stay in the processor's cache."""


class RestoreCopies:
    """For the I/O threads; without state of its own."""

    def __init__(
        self,
        copier: BlockCopier,
        ddr: RowMemory,
        file: SlotIo | None,
        codec: Codec | None,
        digests: PoolDigests,
        staging: Staging,
    ) -> None:
        self._copier, self._ddr, self._file, self._codec = copier, ddr, file, codec
        self._digests, self._staging = digests, staging

    def run(self, job: RestoreJob, piece: RestorePiece, leave_disk: Callable[[], None]) -> None:
        """A disk's error is told to the job."""
        positions = job.wanted(piece.positions)
        if not positions:
            return
        job.begun(piece.tier)
        up = self._land if piece.storage == "none" else self._decode
        if piece.tier == "ddr":
            up(job, positions, piece.layers, self._ddr.rows, slots_of(job, positions))
            return
        with self._staging.taken() as rows:
            slots = self._read(job, positions, piece.layers, rows)
            leave_disk()
            up(job, [positions[slot] for slot in slots], piece.layers, rows, slots)

    def _read(self, job: RestoreJob, positions: Sequence[int], layers: range, rows: Rows) -> list[Slot]:
        """Into the first rows. Which of them hold what they should, as far as their headers say."""
        assert self._file is not None
        slots, into = slots_of(job, positions), first_slots(len(positions))
        begin, end = (layer * job.plan.row_bytes // job.plan.layers for layer in (layers.start, layers.stop))
        try:
            if begin:
                self._file.read_on(slots, rows, into, range(begin, end))
                return into
            names = [job.plan.parts[at].name for at in positions]
            headers = self._file.read(slots, names, rows, into, None if end == job.plan.row_bytes else end)
        except OSError as error:
            job.lost_tier("ssd", f"The SSD could not be read: {error.strerror or error}.")
            return []
        return self._headed(job, positions, headers)

    def _headed(self, job: RestoreJob, positions: Sequence[int], headers: Sequence[SlotHeader | None]) -> list[Slot]:
        """The rows that hold the blocks that they should; the others are lost."""
        right = [i for i, (at, header) in enumerate(zip(positions, headers, strict=True)) if job.headed(at, header)]
        job.lost(without(positions, right), "A slot of the SSD does not hold its block.", is_corrupt=True)
        return [Slot(i) for i in right]

    def _decode(
        self, job: RestoreJob, positions: Sequence[int], layers: range, rows: Rows, slots: Sequence[Slot]
    ) -> None:
        """Compressed rows, once they are found to be what was stored."""
        assert self._codec is not None and layers == range(job.plan.layers)
        right = self._right_as_stored(job, positions, rows, slots)
        for begin in range(0, len(right), self._staging.slots):
            some = right[begin : begin + self._staging.slots]
            batch, batch_slots = [positions[i] for i in some], [slots[i] for i in some]
            with self._staging.taken() as decoded:
                self._codec.decode(rows, batch_slots, decoded)
                self._land(job, batch, layers, decoded, first_slots(len(batch)))

    def _land(
        self, job: RestoreJob, positions: Sequence[int], layers: range, rows: Rows, slots: Sequence[Slot]
    ) -> None:
        """If it is still wanted; and it is digested while it is in the processor's cache."""
        with job.writing() as may_write:
            if may_write and positions:
                self._copier.scatter(layers, rows, slots, blocks_of(job, positions))
        if not may_write:
            return
        job.landed(positions, layers)
        if checked := [at for at in positions if at in job.plan.pool_checks]:
            job.digested(checked, layers, self._digests(blocks_of(job, checked), layers))

    def _right_as_stored(
        self, job: RestoreJob, positions: Sequence[int], rows: Rows, slots: Sequence[Slot]
    ) -> list[int]:
        """Indices of those that are, or are not to be verified; the others are lost."""
        assert self._codec is not None
        checked = [i for i, at in enumerate(positions) if at in job.plan.stored_checks]
        digests = stored_digests(rows, [slots[i] for i in checked], self._codec.stored_bytes)
        wrong = {i for i, digest in zip(checked, digests, strict=True) if digest != job.digest(positions[i])}
        job.lost([positions[i] for i in wrong], CORRUPT, is_corrupt=True)
        return [i for i in range(len(positions)) if i not in wrong]


def stored_digests(rows: Rows, slots: Sequence[Slot], stored_bytes: int) -> list[int]:
    """Of compressed rows: of the stored bytes, as if they were one slice."""
    digests: list[int] = []
    batch = max(1, BATCH_BYTES // stored_bytes)
    for begin in range(0, len(slots), batch):
        digests += unsigned(slice_digests(rows[places(slots[begin : begin + batch]), :stored_bytes]))
    return digests


def slots_of(job: RestoreJob, positions: Sequence[int]) -> list[Slot]:
    return [job.plan.parts[at].slot for at in positions]


def blocks_of(job: RestoreJob, positions: Sequence[int]) -> list[BlockId]:
    return [job.plan.parts[at].block for at in positions]


def first_slots(count: int) -> list[Slot]:
    return [Slot(slot) for slot in range(count)]


def without(positions: Sequence[int], indices: Sequence[int]) -> list[int]:
    return [at for i, at in enumerate(positions) if i not in set(indices)]
