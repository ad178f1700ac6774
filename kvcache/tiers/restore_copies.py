"""Carries out the pieces of restores: reads, decodes, copies, verifies."""

from collections.abc import Callable, Sequence

from baton.digest import slice_digests, unsigned
from kvcache.tiers.codec import Codec
from kvcache.tiers.copier import places
from kvcache.tiers.interface import BlockCopier, Rows, Slot
from kvcache.tiers.io_interface import PoolDigests, RowMemory, SlotIo
from kvcache.tiers.restore import RestoreJob
from kvcache.tiers.restore_pieces import RestorePiece
from kvcache.tiers.staging import Staging

BATCH_BYTES = 512 * 1024
"""Stored bytes that are digested at a time: they and what that takes stay in the processor's cache."""
CORRUPT = "A block was not what was stored: its digest is another."


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
        if piece.tier == "ssd":
            with self._staging.taken() as rows:
                slots = self._read(job, positions, rows)
                leave_disk()
                self._land_whole(job, [positions[slot] for slot in slots], rows, slots)
        elif piece.is_staged:
            self._land_whole(job, positions, self._ddr.rows, slots_of(job, positions))
        elif self._land(job, positions, piece.layers, self._ddr.rows, slots_of(job, positions)):
            job.landed(positions, piece.layers)

    def verify(self, job: RestoreJob, positions: Sequence[int]) -> None:
        """What has landed layer by layer."""
        if positions := job.wanted(positions):
            job.verified(self._right_in_pool(job, positions))

    def _read(self, job: RestoreJob, positions: Sequence[int], rows: Rows) -> list[Slot]:
        """Into the first rows. Which of them hold what they should, by their headers."""
        assert self._file is not None
        names = [job.plan.parts[at].name for at in positions]
        try:
            headers = self._file.read(slots_of(job, positions), names, rows, first_slots(len(positions)))
        except OSError as error:
            job.lost_tier("ssd", f"The SSD could not be read: {error.strerror or error}.")
            return []
        right = [i for i, (at, header) in enumerate(zip(positions, headers, strict=True)) if job.headed(at, header)]
        job.lost(without(positions, right), "A slot of the SSD does not hold its block.", is_corrupt=True)
        return [Slot(i) for i in right]

    def _land_whole(self, job: RestoreJob, positions: Sequence[int], rows: Rows, slots: Sequence[Slot]) -> None:
        """All layers of rows that are stored alike, verified at once."""
        if not positions:
            return
        layers = range(job.plan.layers)
        if job.plan.parts[positions[0]].storage != "none":
            self._decode(job, positions, rows, slots)
        elif self._land(job, positions, layers, rows, slots):
            job.landed(self._right_in_pool(job, positions), layers)

    def _decode(self, job: RestoreJob, positions: Sequence[int], rows: Rows, slots: Sequence[Slot]) -> None:
        """Compressed rows, once they are found to be what was stored."""
        assert self._codec is not None
        layers = range(job.plan.layers)
        right = self._right_as_stored(job, positions, rows, slots)
        for begin in range(0, len(right), self._staging.slots):
            some = right[begin : begin + self._staging.slots]
            batch, batch_slots = [positions[i] for i in some], [slots[i] for i in some]
            with self._staging.taken() as decoded:
                self._codec.decode(rows, batch_slots, decoded)
                if self._land(job, batch, layers, decoded, first_slots(len(batch))):
                    job.landed(batch, layers)

    def _land(
        self, job: RestoreJob, positions: Sequence[int], layers: range, rows: Rows, slots: Sequence[Slot]
    ) -> bool:
        """Whether it was still wanted, and is in the pool now."""
        with job.writing() as may_write:
            if may_write:
                self._copier.scatter(layers, rows, slots, [job.plan.parts[at].block for at in positions])
        return may_write

    def _right_in_pool(self, job: RestoreJob, positions: Sequence[int]) -> list[int]:
        """Those of the positions; the others are lost."""
        digests = self._digests([job.plan.parts[at].block for at in positions])
        right = [i for i, (at, digest) in enumerate(zip(positions, digests, strict=True)) if digest == job.digest(at)]
        job.lost(without(positions, right), CORRUPT, is_corrupt=True)
        return [positions[i] for i in right]

    def _right_as_stored(
        self, job: RestoreJob, positions: Sequence[int], rows: Rows, slots: Sequence[Slot]
    ) -> list[int]:
        """Indices of those that are, or are not to be verified; the others are lost."""
        assert self._codec is not None
        checked = [i for i, at in enumerate(positions) if at in job.plan.checks]
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


def first_slots(count: int) -> list[Slot]:
    return [Slot(slot) for slot in range(count)]


def without(positions: Sequence[int], indices: Sequence[int]) -> list[int]:
    return [at for i, at in enumerate(positions) if i not in set(indices)]
