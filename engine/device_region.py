"""A worker's KV region in device memory, with pinned host staging for transports that move host bytes."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from baton.ids import BlockId
from baton.layout import KVLayout
from engine.digests import DeviceDigester


class DeviceRegion:
    """Owns the device memory. Implements kvtransfer.interface.Region.

    The engine's thread writes the tensor on its own stream and marks each layer when its writes are
    issued. Copies to and from the host run on a stream of the region's, which waits for the mark of their
    layer and not for the layers above it. The views handed out are staging memory, one per call, and live
    as long as somebody holds them. On the CPU device, where tests use it, the streams fall away.
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        self.layout = layout
        self.tensor = torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype), device=device)
        self.digester = DeviceDigester(self.tensor)
        """For the engine, on its thread and stream; `digests` is for everybody else."""
        self._marks: dict[int, torch.cuda.Event] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_host(self) -> bool:
        return False

    def mark(self, layer: int) -> None:
        """On the engine's thread: what was issued so far on its stream is what `readable` must wait for."""
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.tensor.device))
            self._marks[layer] = event

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        """A host copy, taken after the last mark of the layer; waits for it."""
        slices = self._slices(layer, kv, first_block, blocks)
        staging = _staging_for(slices)
        self._copy(layer, staging, slices)
        return _bytes_of(staging)

    def writable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        """Host memory to fill; nothing reaches the device before `written`."""
        return _bytes_of(_staging_for(self._slices(layer, kv, first_block, blocks)))

    def written(self, layer: int, kv: int, first_block: int, blocks: int, view: memoryview) -> None:
        """Copies in what `writable` gave out; waits until it has landed."""
        slices = self._slices(layer, kv, first_block, blocks)
        self._copy(layer, slices, torch.frombuffer(view, dtype=slices.dtype).view(slices.shape))

    def digests(self, blocks: Sequence[BlockId], layers: range | None = None) -> Sequence[int]:
        """Of what lies there after the last mark of each layer; waits for it. Or what these layers add to them."""
        if self._stream is not None:
            for mark in tuple(self._marks.values()):
                self._stream.wait_event(mark)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return self.digester.begin(blocks, layers).wait()

    def share(self) -> None:
        """No other process maps it."""

    def device_address(self) -> tuple[int, int] | None:
        """For transports that move device memory by themselves: address and device number; None on the CPU device.
        Makes the device the calling thread's own."""
        if self._stream is None:
            return None
        torch.cuda.set_device(self.tensor.device)
        return self.tensor.data_ptr(), self.tensor.get_device()

    def ready(self, layer: int) -> None:
        """Waits for the last mark of the layer: what it stands for may be read then."""
        if mark := self._marks.get(layer):
            mark.synchronize()

    def close(self) -> None:
        self.tensor = self.tensor.new_empty(0)
        del self.digester

    def _slices(self, layer: int, kv: int, first_block: int, blocks: int) -> Tensor:
        assert 1 <= blocks <= self.layout.blocks - first_block
        return self.tensor[layer, kv, first_block : first_block + blocks]

    def _copy(self, layer: int, target: Tensor, source: Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        if layer in self._marks:
            self._stream.wait_event(self._marks[layer])
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


def _staging_for(slices: Tensor) -> Tensor:
    return torch.empty(slices.shape, dtype=slices.dtype, pin_memory=slices.is_cuda)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which the view keeps alive."""
    return tensor.view(torch.uint8).flatten().numpy().data
