"""KV below HBM in fewer bytes: int8 with one scale for each layer, keys or values, and KV head of a block.

A stored row is `[layer][k|v]([kv head] scales, float32)([token][kv head][head dim] int8)`, each (layer, k|v) filled up
with zeros to a multiple of 8 bytes: a layer is decoded from its own bytes alone, and a row is digested as whole words.

    scale = max |x| / 127 over the head's tokens and dims,   q = round(x / scale),   x' = q * scale

so |x - x'| <= scale / 2, but for the rounding of float32 (2^-16 of the scale) and of the dtype that x' is stored in.
A block that holds an infinity or a NaN has no scale and is refused: it would come back as something else.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baton.layout import KVLayout
from kvcache.tiers.interface import Rows, Slot, StorageFormat
from kvcache.tiers.rows.narrow_floats import LARGEST, Floats, narrow, widened

STEPS = 127
"""Of int8 on either side of zero."""
SCALE_MIN = float(np.finfo(np.float32).tiny)
"""So that one divided by it is finite."""
ALIGN_BYTES = 8
BATCH_NUMBERS = 64 * 1024
"""Quantised at a time, so that they stay in the processor's cache."""


class Codec(Protocol):
    """Any thread; lets go of Python's lock while it computes."""

    storage: StorageFormat
    stored_bytes: int
    """Of one block."""

    def encode(self, block_rows: Rows, rows: Rows, slots: Sequence[Slot]) -> list[int]:
        """Each row of `block_rows` (blocks as they are, `[layer][k|v][slice]`) into the row of the slot of the same
        index. Returns the indices of those that cannot be stored; their slots hold anything."""

    def decode(self, rows: Rows, slots: Sequence[Slot], block_rows: Rows, layers: range | None = None) -> None:
        """Each slot's row back into the row of `block_rows` of the same index: these layers, or all."""


def codec_for(kv_compression: StorageFormat, layout: KVLayout) -> Codec | None:
    """None: stored as it is."""
    return Int8Codec(layout) if kv_compression == "int8" else None


class Int8Codec:
    """Implements Codec for float32, float16 and bfloat16."""

    storage: StorageFormat = "int8"

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._scale_bytes = 4 * layout.kv_heads
        self._numbers = layout.block_tokens * layout.kv_heads * layout.head_dim
        self._part_bytes = -(-(self._scale_bytes + self._numbers) // ALIGN_BYTES) * ALIGN_BYTES
        self.stored_bytes = 2 * layout.layers * self._part_bytes
        self._batch_layers = max(1, BATCH_NUMBERS // (2 * self._numbers))

    def encode(self, block_rows: Rows, rows: Rows, slots: Sequence[Slot]) -> list[int]:
        return [i for i, slot in enumerate(slots) if not self._encode(block_rows[i], rows[slot])]

    def _encode(self, block: NDArray[np.uint8], stored: NDArray[np.uint8]) -> bool:
        """Whether all of it could be stored."""
        stored.reshape(-1, self._part_bytes)[:, self._scale_bytes + self._numbers :] = 0
        return all(
            self._quantise(self._slices(block, layers), *self._parts(stored, layers))
            for layers in self._batches(range(self._layout.layers))
        )

    def _quantise(self, slices: NDArray[np.uint8], scales: NDArray[np.float32], numbers: NDArray[np.int8]) -> bool:
        x = widened(slices, self._layout.dtype).reshape(numbers.shape)
        largest = np.maximum(x.max(axis=1), -x.min(axis=1)).max(axis=2)
        if not (largest <= LARGEST[self._layout.dtype]).all():
            return False
        scales[:] = np.maximum(largest / np.float32(STEPS), np.float32(SCALE_MIN))
        steps = x * (1 / scales)[:, None, :, None]
        np.rint(steps, out=steps)
        numbers[:] = steps
        return True

    def decode(self, rows: Rows, slots: Sequence[Slot], block_rows: Rows, layers: range | None = None) -> None:
        for row, slot in enumerate(slots):
            for some in self._batches(range(self._layout.layers) if layers is None else layers):
                scales, numbers = self._parts(rows[slot], some)
                x: Floats = numbers * scales[:, None, :, None]
                slices = self._slices(block_rows[row], some)
                narrow(x.reshape(len(slices), -1), slices, self._layout.dtype)

    def _batches(self, layers: range) -> list[range]:
        return [layers[i : i + self._batch_layers] for i in range(0, len(layers), self._batch_layers)]

    def _slices(self, block: NDArray[np.uint8], layers: range) -> NDArray[np.uint8]:
        """Of these layers, keys and values: [slice][byte]."""
        size = self._layout.slice_bytes
        return block[2 * layers.start * size : 2 * layers.stop * size].reshape(-1, size)

    def _parts(self, row: NDArray[np.uint8], layers: range) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Of these layers: the scales, [slice][kv head], and the numbers, [slice][token][kv head][head dim]."""
        size, end = self._part_bytes, self._scale_bytes + self._numbers
        parts = row[2 * layers.start * size : 2 * layers.stop * size].reshape(-1, size)
        layout = self._layout
        numbers = parts[:, self._scale_bytes : end].view(np.int8)
        shape = (len(parts), layout.block_tokens, layout.kv_heads, layout.head_dim)
        return parts[:, : self._scale_bytes].view(np.float32), numbers.reshape(shape)
