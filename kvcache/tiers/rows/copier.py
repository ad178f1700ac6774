"""Copies between a pool in host memory and rows of host memory."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockId
from baton.layout import KVLayout
from kvcache.tiers.interface import Rows, Slot
from kvcache.tiers.rows.runs import runs_of

Slices = NDArray[np.uint8]


class HostCopier:
    """Implements BlockCopier over a region in host memory, which must outlive it.

    One call of numpy copies as much as possible: each lets go of Python's lock and must get it back, and while the
    engine computes that can take longer than the copy.
    """

    def __init__(self, memory: memoryview, layout: KVLayout) -> None:
        self._layout = layout
        region = np.frombuffer(memory, np.uint8, layout.region_bytes)
        self._region = region.reshape(layout.layers, 2, layout.blocks, layout.slice_bytes)

    def gather(self, blocks: Sequence[BlockId], rows: Rows, slots: Sequence[Slot]) -> None:
        """Runs of adjacent blocks to adjacent slots are one copy, any other block is one."""
        assert len(blocks) == len(slots)
        slices = slices_of(rows, self._layout)
        for run in runs_of(blocks, slots):
            block, slot, count = blocks[run.start], slots[run.start], run.stop - run.start
            slices[slot : slot + count] = self._region[:, :, block : block + count].transpose(2, 0, 1, 3)

    def scatter(self, layers: range, rows: Rows, slots: Sequence[Slot], blocks: Sequence[BlockId]) -> None:
        """Runs of adjacent slots are one copy, wherever the blocks are: numpy writes to scattered places without a
        detour, though it reads from them only with one. Any other block is one."""
        assert len(blocks) == len(slots)
        assert layers.step == 1
        some = slice(layers.start, layers.stop)
        pool, slices = self._region[some], slices_of(rows, self._layout)[:, some]
        for run in runs_of(slots):
            slot, count = slots[run.start], run.stop - run.start
            if count == 1:
                pool[:, :, blocks[run.start]] = slices[slot]
            else:
                pool[:, :, places(blocks[run])] = slices[slot : slot + count].transpose(1, 2, 0, 3)


def slices_of(rows: Rows, layout: KVLayout) -> Slices:
    """Rows of uncompressed blocks as [slot][layer][k|v][byte of the slice]: a view."""
    assert rows.strides[1] == 1 and rows.shape[1] >= layout.block_bytes
    return np.lib.stride_tricks.as_strided(
        rows,
        (len(rows), layout.layers, 2, layout.slice_bytes),
        (rows.strides[0], 2 * layout.slice_bytes, layout.slice_bytes, 1),
    )


def places(numbers: Sequence[int]) -> slice | NDArray[np.int64]:
    """As numpy takes them: adjacent ones are a view."""
    some = np.asarray(numbers, np.int64)
    if bool((np.diff(some) == 1).all()):
        return slice(int(some[0]), int(some[-1]) + 1)
    return some
