"""Adjacent blocks are moved together: fewer and larger copies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.interface import Region

RUN_BYTES_MAX = 4 * 2**20
"""Longest copy, and so the longest that one can be neither cancelled nor fenced off: about a millisecond."""


@dataclass(frozen=True, slots=True)
class Run:
    """`blocks` source blocks from `source` on go to as many target blocks from `target` on."""

    source: int
    target: int
    blocks: int


def runs_of(source: Sequence[BlockId], target: Sequence[BlockId], blocks_max: int) -> Iterator[Run]:
    """Splits a copy into the fewest runs, in order, of at most `blocks_max` blocks."""
    assert len(source) == len(target)
    start = 0
    for i in range(1, len(source) + 1):
        is_adjacent = i < len(source) and source[i] == source[i - 1] + 1 and target[i] == target[i - 1] + 1
        if not is_adjacent or i - start == blocks_max:
            yield Run(source[start], target[start], i - start)
            start = i


def run_blocks_max(layout: KVLayout) -> int:
    """How many slices fit in RUN_BYTES_MAX; at least one."""
    return max(1, RUN_BYTES_MAX // layout.slice_bytes)


def copy_run(source: Region, layer: int, kv: int, run: Run, place: memoryview) -> int:
    """One memcpy from the source's blocks of the run, without the GIL; returns its bytes."""
    data = source.readable(layer, kv, run.source, run.blocks)
    np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(data, np.uint8))
    return data.nbytes
