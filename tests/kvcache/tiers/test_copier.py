"""Copies between a pool and rows, against plain loops; that Python's lock is free meanwhile."""

import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockId
from baton.layout import KVLayout
from kvcache.tiers.interface import Slot
from kvcache.tiers.rows.copier import HostCopier
from kvcache.tiers.rows.host_memory import HostMemory
from kvcache.tiers.rows.runs import runs_of

LAYOUT = KVLayout(layers=3, blocks=12, block_tokens=2, kv_heads=1, head_dim=5, dtype="float16")  # slices of 20 bytes
ROWS = 9


def random_region() -> bytearray:
    return bytearray(np.random.default_rng(1).bytes(LAYOUT.region_bytes))


def slices_in_row_order(region: bytes | bytearray, block: int) -> bytes:
    size = LAYOUT.slice_bytes
    places = [LAYOUT.slice_offset(layer, kv, block) for layer in range(LAYOUT.layers) for kv in (0, 1)]
    return b"".join(bytes(region[place : place + size]) for place in places)


numbers = st.integers(0, ROWS).flatmap(
    lambda count: st.tuples(
        st.permutations(range(LAYOUT.blocks)).map(lambda some: some[:count]),
        st.permutations(range(ROWS)).map(lambda some: some[:count]),
    )
)
stretches = st.tuples(st.integers(1, 4), st.integers(0, 8), st.integers(0, 5)).map(
    lambda chosen: (
        list(range(chosen[1], chosen[1] + chosen[0])),
        list(range(chosen[2], chosen[2] + chosen[0])),
    )
)


@given(st.one_of(numbers, stretches))
def test_gather_fills_the_rows_of_the_slots(chosen: tuple[list[int], list[int]]) -> None:
    blocks, slots = chosen
    region = random_region()
    rows = np.full((ROWS, LAYOUT.block_bytes + 3), 7, np.uint8)
    HostCopier(memoryview(region), LAYOUT).gather([BlockId(b) for b in blocks], rows, [Slot(s) for s in slots])
    expected = {slot: slices_in_row_order(region, block) for block, slot in zip(blocks, slots, strict=True)}
    for slot in range(ROWS):
        assert rows[slot, : LAYOUT.block_bytes].tobytes() == expected.get(slot, bytes([7]) * LAYOUT.block_bytes)
        assert (rows[slot, LAYOUT.block_bytes :] == 7).all()


@given(st.one_of(numbers, stretches), st.integers(0, 2), st.integers(1, 3))
def test_scatter_writes_these_layers_of_these_blocks(
    chosen: tuple[list[int], list[int]], first: int, count: int
) -> None:
    blocks, slots = chosen
    layers = range(first, min(first + count, LAYOUT.layers))
    memory = HostMemory(ROWS, LAYOUT.block_bytes)
    memory.rows[:] = np.random.default_rng(2).integers(0, 256, memory.rows.shape, np.uint8)
    region = random_region()
    expected = bytearray(region)
    size = LAYOUT.slice_bytes
    for block, slot in zip(blocks, slots, strict=True):
        for layer in layers:
            for kv in (0, 1):
                place, begin = LAYOUT.slice_offset(layer, kv, block), (2 * layer + kv) * size
                expected[place : place + size] = memory.rows[slot, begin : begin + size].tobytes()
    copier = HostCopier(memoryview(region), LAYOUT)
    copier.scatter(layers, memory.rows, [Slot(s) for s in slots], [BlockId(b) for b in blocks])
    assert region == expected
    memory.close()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_runs_cover_all_and_break_only_where_they_must(pairs: list[tuple[int, int]]) -> None:
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    runs = list(runs_of(left, right))
    assert [at for run in runs for at in range(run.start, run.stop)] == list(range(len(pairs)))
    for run in runs:
        for before, after in pairwise(range(run.start, run.stop)):
            assert left[after] == left[before] + 1 and right[after] == right[before] + 1
    for before, after in pairwise(runs):
        at = after.start
        assert before.stop == at and not (left[at] == left[at - 1] + 1 and right[at] == right[at - 1] + 1)


@pytest.mark.parametrize("blocks", [range(24), range(0, 48, 2)], ids=["adjacent", "scattered"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_pythons_lock_is_free_during_a_copy(blocks: range, direction: str) -> None:
    """Nobody is asked for the lock (a switch interval of minutes), so another thread gets it only if it is let go."""
    layout = KVLayout(layers=4, blocks=50, block_tokens=64, kv_heads=8, head_dim=64, dtype="float32")
    copier = HostCopier(memoryview(bytearray(layout.region_bytes)), layout)
    memory = HostMemory(len(blocks), layout.block_bytes)
    memory.rows[:] = 1
    ids, slots = [BlockId(block) for block in blocks], [Slot(slot) for slot in range(len(blocks))]
    is_copying, stop, counted = [False], [False], [0]

    def count() -> None:
        while not stop[0]:
            counted[0] += is_copying[0]
            time.sleep(0)  # lets go of it

    interval_s = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    counter.start()
    try:
        sys.setswitchinterval(600)
        for _ in range(100):
            is_copying[0] = True
            if direction == "up":
                copier.scatter(range(layout.layers), memory.rows, slots, ids)
            else:
                copier.gather(ids, memory.rows, slots)
            is_copying[0] = False
            if counted[0]:
                break
    finally:
        stop[0] = True
        sys.setswitchinterval(interval_s)
        counter.join()
        memory.close()
    assert counted[0]
