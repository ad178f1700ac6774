"""A worker's KV region in host memory, which other processes of the machine can map and write."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Self

from baton.digest import block_digests
from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import DTYPE_BYTES, KVLayout
from baton.process import ProcessIdentity
from kvtransfer.memory import AttachedMemory, Share, SharedMemory

_DESCRIPTOR_BYTES_MAX = 1024


class HostRegion:
    """Owns the memory. `torch.frombuffer(region.memory, ...)` and other views share it and may outlive
    `close`: the pages are freed when the last of them dies. Implements kvtransfer.interface.Region."""

    is_host = True

    def __init__(self, layout: KVLayout, shared: SharedMemory) -> None:
        self.layout = layout
        self._shared = shared

    @classmethod
    def allocate(cls, layout: KVLayout) -> Self:
        """Zero-filled, and not resident until touched. Raises TransferError if it cannot be mapped."""
        return cls(layout, SharedMemory(layout.region_bytes))

    @property
    def memory(self) -> memoryview:
        """The whole region: `layout.region_bytes` bytes, writable, starting on a page."""
        return self._shared.memory

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        return slices_of(self.memory, self.layout, layer, kv, first_block, blocks)

    def writable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        return slices_of(self.memory, self.layout, layer, kv, first_block, blocks)

    def written(self, layer: int, kv: int, first_block: int, blocks: int, view: memoryview) -> None:
        """Nothing to do: the view was the region itself."""

    def digests(self, blocks: Sequence[BlockId], layers: range | None = None) -> Sequence[int]:
        """Or what these layers add to them."""
        return block_digests(self.memory, self.layout, blocks, layers)

    def share(self) -> bytes | None:
        """For `attach` in another process; holds a secret, so it is never logged."""
        return self._shared.share().pack() + pack_layout(self.layout)

    def close(self) -> None:
        self._shared.close()


class AttachedRegion:
    """Another process's HostRegion, mapped here. Only for slices of tickets that it gave."""

    def __init__(self, layout: KVLayout, attached: AttachedMemory) -> None:
        self.layout = layout
        self._attached = attached

    @property
    def owner(self) -> ProcessIdentity:
        return self._attached.owner

    @property
    def memory(self) -> memoryview:
        return self._attached.memory

    def writable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        return slices_of(self.memory, self.layout, layer, kv, first_block, blocks)

    def close(self) -> None:
        self._attached.close()


def attach(descriptor: bytes) -> AttachedRegion:
    """Maps the region that `share` described. Raises TransferError with the reason where it cannot."""
    share, layout = Share.unpack(descriptor[: Share.FORMAT.size]), unpack_layout(descriptor[Share.FORMAT.size :])
    if share.size != layout.region_bytes:
        raise TransferError("The region of the other process has another size than its layout needs.")
    return AttachedRegion(layout, AttachedMemory.attach(share))


def slices_of(memory: memoryview, layout: KVLayout, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
    """`blocks` adjacent slices of a region as bytes."""
    assert 1 <= blocks <= layout.blocks - first_block
    start = layout.slice_offset(layer, kv, first_block)
    return memory[start : start + blocks * layout.slice_bytes]


def pack_layout(layout: KVLayout) -> bytes:
    return json.dumps(asdict(layout), separators=(",", ":")).encode()


def unpack_layout(data: bytes) -> KVLayout:
    """Raises TransferError for anything that `pack_layout` did not make."""
    try:
        fields = json.loads(data[:_DESCRIPTOR_BYTES_MAX])
        layout = KVLayout(**fields)
        is_sound = layout.dtype in DTYPE_BYTES and all(type(size) is int and size > 0 for size in layout.shape)
    except (ValueError, TypeError):
        is_sound = False
    if not is_sound:
        raise TransferError("This is not a KV layout that this version understands.")
    return layout
