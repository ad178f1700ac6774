"""Copies KV blocks between a pool in device memory and rows of host memory."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from baton.ids import BlockId
from engine.device_region import DeviceRegion
from kvcache.tiers.interface import Rows, Slot

STAGING_BYTES = 16 * 2**20
"""Copied at a time."""


class DeviceCopier:
    """Implements kvcache.tiers.interface.BlockCopier. On the CPU device, where tests use it, the streams fall away.

    Blocks are gathered on the device into one piece of memory, or scattered from one, and that piece goes over the bus
    at once: on a stream of the calling thread's own, beside the engine's. Rows in pinned memory are copied to and from
    directly, others through a pinned piece.
    """

    def __init__(self, region: DeviceRegion) -> None:
        """On the thread, and with the current stream, of the engine. The region must outlive the copier."""
        layout = region.layout
        self._bytes = region.tensor.flatten(3).view(torch.uint8).view(layout.layers, 2, layout.blocks, -1)
        """[layer][k|v][block][byte of the slice]: the region itself."""
        self._engine_stream = torch.cuda.current_stream(region.tensor.device) if region.tensor.is_cuda else None
        self._own = threading.local()
        self._freed: torch.cuda.Event | None = None

    def gather(self, blocks: Sequence[BlockId], rows: Rows, slots: Sequence[Slot]) -> None:
        with self._on_own_stream() as stream:
            if stream is not None and self._engine_stream is not None:
                stream.wait_event(self._engine_stream.record_event())
            for some, their_slots in self._pieces(blocks, slots, range(len(self._bytes))):
                picked = self._bytes.index_select(2, self._index(some)).permute(2, 0, 1, 3).flatten(1)
                self._to_rows(picked, rows, their_slots, stream)

    def scatter(self, layers: range, rows: Rows, slots: Sequence[Slot], blocks: Sequence[BlockId]) -> None:
        """The lowest layer's waits for what the engine has issued by then, and so do those above it: the blocks may
        have been somebody else's, whose last step is still being computed."""
        with self._on_own_stream() as stream:
            if stream is not None and self._engine_stream is not None:
                if layers.start == 0 or self._freed is None:
                    self._freed = self._engine_stream.record_event()
                stream.wait_event(self._freed)
            some_layers = self._bytes[layers.start : layers.stop]
            first, end = (2 * layer * self._bytes.shape[-1] for layer in (layers.start, layers.stop))
            for some, their_slots in self._pieces(blocks, slots, layers):
                picked = self._from_rows(rows, their_slots, first, end)
                slices = picked.view(len(some), len(layers), 2, -1).permute(1, 2, 0, 3)
                some_layers.index_copy_(2, self._index(some), slices)
            if stream is not None:
                stream.synchronize()

    def _pieces(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], layers: range
    ) -> Iterator[tuple[Sequence[BlockId], Sequence[Slot]]]:
        assert len(blocks) == len(slots)
        step = max(1, STAGING_BYTES // (2 * len(layers) * self._bytes.shape[-1]))
        for first in range(0, len(blocks), step):
            yield blocks[first : first + step], slots[first : first + step]

    def _index(self, blocks: Sequence[BlockId]) -> Tensor:
        index = torch.tensor(blocks, dtype=torch.long, pin_memory=self._bytes.is_cuda)
        return index.to(self._bytes.device, non_blocking=True)

    def _to_rows(self, picked: Tensor, rows: Rows, slots: Sequence[Slot], stream: "torch.cuda.Stream | None") -> None:
        """[block][byte], into the beginning of each slot's row; it is there when this returns."""
        on_host = picked
        if stream is not None:
            on_host = torch.empty(picked.shape, dtype=picked.dtype, pin_memory=True)
            on_host.copy_(picked, non_blocking=True)
            stream.synchronize()
        torch.from_numpy(rows)[:, : picked.shape[1]].index_copy_(0, torch.tensor(slots), on_host)

    def _from_rows(self, rows: Rows, slots: Sequence[Slot], first: int, end: int) -> Tensor:
        """These bytes of each slot's row as [block][byte] on the device."""
        wanted = torch.from_numpy(rows)[:, first:end]
        if not self._bytes.is_cuda:
            return wanted.index_select(0, torch.tensor(slots))
        on_host = torch.empty((len(slots), end - first), dtype=torch.uint8, pin_memory=True)
        torch.index_select(wanted, 0, torch.tensor(slots), out=on_host)
        return on_host.to(self._bytes.device, non_blocking=True)

    @contextmanager
    def _on_own_stream(self) -> "Iterator[torch.cuda.Stream | None]":
        if self._engine_stream is None:
            yield None
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._bytes.device)
        with torch.cuda.stream(self._own.stream):
            yield self._own.stream
