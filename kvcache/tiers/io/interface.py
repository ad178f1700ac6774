"""What the I/O threads ask of the memory, the file and the codec that they move rows between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from baton.ids import BlockHash, BlockId
from kvcache.tiers.interface import LowerTier, Rows, Slot, SlotHeader, StorageFormat

PoolDigests = Callable[[Sequence[BlockId], range], Sequence[int]]
"""What these layers, as they lie there, add to baton.digest's of blocks of the pool; any thread."""
VerifyDdr = Literal["always", "sampled", "never"]
"""Which blocks from DDR are compared with their digests; those from SSD all are."""


@dataclass(frozen=True, slots=True)
class IoSizes:
    """How work is cut for the I/O threads."""

    piece_bytes: int = 4 * 2**20
    """Copied and verified, or written, in one turn of a thread, about a millisecond: so long a restore waits behind
    what is less urgent."""
    group_bytes: int = 2**20
    """A group of layers is this much at least, over all blocks: less is not worth a turn."""
    staging_bytes: int = 6 * 2**20
    """Read in one turn: a disk is nearly as fast as it can be by calls of a few MiB, and one such part is read while
    the one before it is copied and verified. Whole huge pages: 2, 4, 6 and 8 MiB came up at 3.3, 3.7, 4.4 and 3.4 GB/s
    where that was tried, 3 and 5 MiB at 1.9 and 3.1."""
    read_bytes: int = 2**20
    """A row of the SSD is read in parts, by groups of layers, if each has so much."""


class RowMemory(Protocol):
    """An arena of host memory."""

    @property
    def rows(self) -> Rows: ...


class SlotIo(Protocol):
    """Slots of a file. Different threads may use different slots at one time. Raises OSError where the disk fails."""

    def read(
        self,
        slots: Sequence[Slot],
        names: Sequence[BlockHash],
        rows: Rows,
        row_slots: Sequence[Slot],
        size_bytes: int | None = None,
    ) -> Sequence[SlotHeader | None]:
        """Payloads, or so many of their first bytes, into rows; None: that slot does not hold the block of that
        name."""

    def read_on(self, slots: Sequence[Slot], rows: Rows, row_slots: Sequence[Slot], part: range) -> None:
        """These bytes of payloads, to where they belong in the rows. Bytes around them may be read, too."""

    def write(
        self, slots: Sequence[Slot], headers: Sequence[SlotHeader], rows: Rows, row_slots: Sequence[Slot]
    ) -> None: ...

    def erase(self, slots: Sequence[Slot]) -> None: ...

    def scan(self, found: Callable[[Slot, SlotHeader], None], is_stopped: Callable[[], bool]) -> None: ...


@dataclass(frozen=True, slots=True)
class RestorePart:
    """One block on its way up: from where, and into which block of the pool."""

    tier: LowerTier
    slot: Slot
    name: BlockHash
    digest: int | None
    """As SlotHeader has it. None, of SSD only: what the slot's header says."""
    storage: StorageFormat
    block: BlockId
