"""What the store asks of the I/O: TierIo's part that it uses."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

from baton.ids import BlockId
from kvcache.tiers.interface import LowerTier, Restore, Slot, SlotHeader
from kvcache.tiers.io.interface import RestorePart

T_co = TypeVar("T_co", covariant=True)


class Job(Protocol[T_co]):
    """Something that ends by itself."""

    @property
    def is_done(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended."""

    @property
    def error(self) -> OSError | None: ...

    @property
    def result(self) -> T_co:
        """Once it is done, and has not failed."""


class RunningRestore(Restore, Protocol):
    """What the store must know of a restore when it has ended."""

    @property
    def corrupt(self) -> AbstractSet[int]:
        """The parts, by position, that were not what had been stored."""

    @property
    def has_disk_failed(self) -> bool: ...


class StoreIo(Protocol):
    """Slots and blocks that are given to a job are the job's until it has ended."""

    @property
    def bytes_in_flight(self) -> int: ...

    @property
    def down_s(self) -> Mapping[LowerTier, float]:
        """How long copies down into each tier have taken, all together."""

    def offload(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> Job[Sequence[int | None]]: ...

    def offload_now(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> Sequence[int | None]: ...

    def demote(
        self, ddr_slots: Sequence[Slot], ssd_slots: Sequence[Slot], headers: Sequence[SlotHeader]
    ) -> Job[None]: ...

    def restore(self, parts: Sequence[RestorePart]) -> RunningRestore: ...

    def erase(self, ssd_slots: Sequence[Slot]) -> Job[None]: ...

    def scan(self, found: Callable[[Slot, SlotHeader], None]) -> Job[None]: ...

    def close(self) -> bool: ...
