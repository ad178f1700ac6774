"""A region as NIXL sees it: one stretch of host or device memory."""

import struct
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.interface import Region

HOST, DEVICE = 0, 1


@runtime_checkable
class DeviceMemory(Protocol):
    """What a region that lies in a device's memory has besides."""

    def device_address(self) -> tuple[int, int] | None:
        """Where the region starts and on which CUDA device; None where it lies on none. Makes the device the calling
        thread's own, as that thread is about to move its bytes."""

    def ready(self, layer: int) -> None:
        """Returns when what was issued for the layer so far is in memory; called in a thread."""


@dataclass(frozen=True, slots=True)
class Segment:
    kind: int
    address: int
    size_bytes: int
    device: int
    holder: object = field(default=None, compare=False, repr=False)
    """Keeps the memory, where it is this process's own."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("!BQQI")

    @property
    def mem_type(self) -> str:
        return ("DRAM", "VRAM")[self.kind]

    def slices(self, layout: KVLayout) -> NDArray[np.uint64]:
        """All slices, in the order of `slice_index`, as one row: address, bytes, device, stride, count."""
        count = self.size_bytes // layout.slice_bytes
        return np.array([[self.address, layout.slice_bytes, self.device, layout.slice_bytes, count]], np.uint64)

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.kind, self.address, self.size_bytes, self.device)

    @classmethod
    def unpack(cls, data: bytes, layout: KVLayout) -> "Segment":
        """Raises TransferError for what is no segment that holds such a region."""
        try:
            segment = cls(*cls.FORMAT.unpack(data))
        except struct.error:
            raise TransferError("This is not a segment that this version understands.") from None
        is_in_memory = segment.address + segment.size_bytes < 2**64
        if segment.kind not in (HOST, DEVICE) or segment.size_bytes != layout.region_bytes or not is_in_memory:
            raise TransferError("The peer's memory is not what its layout needs.")
        return segment


def segment_of(region: Region) -> Segment:
    """Raises TransferError where NIXL cannot reach the region."""
    layout = region.layout
    if region.is_host:
        first = np.frombuffer(region.readable(0, 0, 0, 1), np.uint8)
        return Segment(HOST, first.ctypes.data, layout.region_bytes, 0, holder=first)
    place = region.device_address() if isinstance(region, DeviceMemory) else None
    if place is None:
        raise TransferError("This worker's KV region is in memory that NIXL cannot reach.")
    address, device = place
    return Segment(DEVICE, address, layout.region_bytes, device, holder=region)


def slice_indices(layout: KVLayout, layer: int, blocks: NDArray[np.int32]) -> NDArray[np.int32]:
    """The key slices of the blocks in a layer, then their value slices, by their place in the region."""
    keys = layer * 2 * layout.blocks + blocks
    return np.concatenate((keys, keys + layout.blocks)).astype(np.int32)
