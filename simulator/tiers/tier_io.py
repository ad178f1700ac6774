"""The I/O of a worker's lower tiers in virtual time: it takes what the devices' speeds say, and moves nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton.ids import BlockId
from baton.latency import Tier
from kvcache.tiers.interface import LowerTier, Slot, SlotHeader
from kvcache.tiers.io.interface import RestorePart
from simulator.profile import TierProfile
from simulator.tiers.device import Device, Haul
from simulator.tiers.restore import DIGEST, SimulatedRestore
from simulator.virtual_time import VirtualTime

T = TypeVar("T")
HEADER_BYTES = 4096
"""Of a slot on the SSD, before its row."""


@dataclass(slots=True)
class SimulatedJob(Generic[T]):
    """Implements kvcache.tiers.moves.store_io.Job."""

    result: T
    is_done: bool = False
    error: OSError | None = None

    def wait(self, timeout_s: float) -> bool:
        del timeout_s
        return self.is_done


class SimulatedTierIo:
    """Implements kvcache.tiers.moves.store_io.StoreIo. A row below HBM is as large as its block."""

    def __init__(
        self,
        time: VirtualTime,
        speeds: TierProfile,
        layers: int,
        block_bytes: int,
        wake: Callable[[], None],
        layer_landed: Callable[[], None],
    ) -> None:
        """`wake` is called when a job has ended, `layer_landed` when a restore has got on."""
        self._time, self._speeds = time, speeds
        self._layers, self._block_bytes = layers, block_bytes
        self._wake, self._layer_landed = wake, layer_landed
        self._devices: dict[LowerTier, Device] = {"ddr": Device(time), "ssd": Device(time)}
        self.bytes_in_flight = 0
        self.down_s: dict[LowerTier, float] = {"ddr": 0.0, "ssd": 0.0}
        self.restored_bytes: Counter[Tier] = Counter()
        self._stall_s = 0.0

    def take_stall_s(self) -> float:
        """How long copies at once have held up the engine since this was last asked."""
        taken, self._stall_s = self._stall_s, 0.0
        return taken

    # ---- down

    def offload(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> SimulatedJob[Sequence[int | None]]:
        del slots, digests
        return self._down("ddr", len(blocks), [DIGEST] * len(blocks))

    def offload_now(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], digests: Sequence[int | None]
    ) -> Sequence[int | None]:
        del slots, digests
        seconds = self._speeds.ddr.store.time_s(len(blocks) * self._block_bytes)
        self.down_s["ddr"] += seconds
        self._stall_s += seconds
        return [DIGEST] * len(blocks)

    def demote(
        self, ddr_slots: Sequence[Slot], ssd_slots: Sequence[Slot], headers: Sequence[SlotHeader]
    ) -> SimulatedJob[None]:
        del ssd_slots, headers
        return self._down("ssd", len(ddr_slots), None)

    def _down(self, tier: LowerTier, blocks: int, result: T) -> SimulatedJob[T]:
        job, size_bytes = SimulatedJob(result), blocks * self._block_bytes
        seconds = self._speeds.of(tier).store.time_s(size_bytes)

        def ended() -> None:
            self.bytes_in_flight -= size_bytes
            self.down_s[tier] += seconds
            self._end(job)

        self.bytes_in_flight += size_bytes
        self._devices[tier].take_down(Haul(seconds, ended))
        return job

    def erase(self, ssd_slots: Sequence[Slot]) -> SimulatedJob[None]:
        job = SimulatedJob(None)
        seconds = self._speeds.ssd.store.time_s(len(ssd_slots) * HEADER_BYTES)
        self._devices["ssd"].take_down(Haul(seconds, lambda: self._end(job)))
        return job

    def scan(self, found: Callable[[Slot, SlotHeader], None]) -> SimulatedJob[None]:
        """Of a file that is new."""
        del found
        return SimulatedJob(None, is_done=True)

    def _end(self, job: SimulatedJob[T]) -> None:
        job.is_done = True
        self._wake()

    # ---- up

    def restore(self, parts: Sequence[RestorePart]) -> SimulatedRestore:
        def ended() -> None:
            result = restore.result
            assert result is not None
            for timing in result.timings:
                self.restored_bytes[timing.tier] += timing.size_bytes
            self._wake()

        costs = {tier: self._speeds.of(tier).restore for tier in self._devices}
        restore = SimulatedRestore(parts, self._layers, self._block_bytes, costs, self._time, self._layer_landed, ended)
        restore.begin(self._devices)
        return restore

    def close(self) -> bool:
        return True
