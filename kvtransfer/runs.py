"""Adjacent blocks are moved together: fewer and larger copies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.interface import Source

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


def run_blocks_max(layout: KVLayout, bytes_max: int = RUN_BYTES_MAX) -> int:
    """How many slices fit in it; at least one."""
    return max(1, bytes_max // layout.slice_bytes)


def copy_run(source: Source, layer: int, kv: int, run: Run, place: memoryview) -> int:
    """One memcpy from the source's blocks of the run, without the GIL; returns its bytes."""
    data = source.readable(layer, kv, run.source, run.blocks)
    np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(data, np.uint8))
    return data.nbytes


Rows = NDArray[np.uint8]
"""`[block][byte]`: adjacent slices."""


def rows_of(view: memoryview, layout: KVLayout) -> Rows:
    return np.frombuffer(view, np.uint8).reshape(-1, layout.slice_bytes)


def source_rows(source: Source, layer: int) -> Callable[[int, Run], Rows]:
    """How to get at the bytes of a run's source blocks in a layer, by `kv` and run. Views, and quick to take, in host
    memory; elsewhere copies that may wait for the device."""
    layout = source.layout
    if not source.is_host:
        return lambda kv, run: rows_of(source.readable(layer, kv, run.source, run.blocks), layout)
    rows = [rows_of(source.readable(layer, kv, 0, layout.blocks), layout) for kv in (0, 1)]
    return lambda kv, run: rows[kv][run.source : run.source + run.blocks]
