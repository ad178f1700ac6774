"""The digest of a block: what it is, and what changes it sees."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.digest import BATCH_BYTES, block_digests, slice_digests, slice_weights, word_weights
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.region import HostRegion

LAYOUT = KVLayout(layers=3, blocks=4, block_tokens=4, kv_heads=2, head_dim=4, dtype="float16")
ODD = KVLayout(layers=2, blocks=3, block_tokens=1, kv_heads=1, head_dim=5, dtype="bfloat16")
Slices = NDArray[np.uint8]


def filled(layout: KVLayout, seed: int = 0) -> tuple[memoryview, Slices]:
    """Random bytes, as the region's memory and as [layer][k|v][block][bytes of a slice] over it."""
    memory = bytearray(np.random.default_rng(seed).bytes(layout.region_bytes))
    return memoryview(memory), np.frombuffer(memory, np.uint8).reshape(*layout.shape[:3], -1)


def digest(memory: memoryview, layout: KVLayout, block: int = 1) -> int:
    (one,) = block_digests(memory, layout, [BlockId(block)])
    return one


def by_definition(slices: Slices, block: int) -> int:
    """As the module's docstring says, in integers of any size."""
    total = 0
    for layer in range(slices.shape[0]):
        for kv in (0, 1):
            data = slices[layer, kv, block].tobytes()
            data += bytes(-len(data) % 8)
            low, high = word_weights(len(data) // 8)
            words = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
            s = sum(int(w) * x + int(v) * (x >> 32) for w, v, x in zip(low, high, words, strict=True))
            total += int(slice_weights(slices.shape[0])[layer, kv]) * s
    return total % 2**64


@pytest.mark.parametrize("layout", [LAYOUT, ODD, replace(ODD, head_dim=1), replace(LAYOUT, layers=1)])
def test_it_is_what_its_definition_says(layout: KVLayout) -> None:
    memory, slices = filled(layout)
    blocks = [BlockId(block) for block in range(layout.blocks)]
    assert block_digests(memory, layout, blocks) == [by_definition(slices, block) for block in blocks]


def test_known_answers_hold_for_ever() -> None:
    """Workers of two versions must agree."""
    memory = memoryview(bytes(i * 7 % 256 for i in range(LAYOUT.region_bytes)))
    known = [0xDC4C1A4A4E5426D0, 0x9D60657F9CDE63D0]
    assert block_digests(memory, LAYOUT, [BlockId(0), BlockId(3)]) == known


@given(st.integers(0, 2), st.integers(0, 1), st.integers(0, LAYOUT.slice_bytes * 8 - 1), st.integers(0, 99))
def test_every_single_bit_is_seen(layer: int, kv: int, bit: int, seed: int) -> None:
    memory, slices = filled(LAYOUT, seed)
    before = digest(memory, LAYOUT)
    slices[layer, kv, 1, bit // 8] ^= 1 << bit % 8
    assert digest(memory, LAYOUT) != before


@given(st.integers(0, LAYOUT.slice_bytes // 4 - 1), st.integers(0, 2**32 - 1), st.integers(0, 99))
def test_every_change_of_half_a_word_is_seen(half: int, content: int, seed: int) -> None:
    memory, slices = filled(LAYOUT, seed)
    halves = slices.view(np.uint32)[2, 1, 1]
    before, was = digest(memory, LAYOUT), halves[half]
    halves[half] = content
    assert (digest(memory, LAYOUT) == before) == (was == content)


@given(st.sets(st.integers(0, LAYOUT.slice_bytes * 8 - 1), min_size=1, max_size=40), st.integers(0, 99))
def test_any_bits_of_a_slice_are_seen(bits: set[int], seed: int) -> None:
    """Not each and every pattern, but none that a search finds."""
    memory, slices = filled(LAYOUT, seed)
    before = digest(memory, LAYOUT)
    for bit in bits:
        slices[0, 1, 1, bit // 8] ^= 1 << bit % 8
    assert digest(memory, LAYOUT) != before


def test_two_top_bits_do_not_cancel() -> None:
    """In a sum of w * x alone each of them would count 2^63, whatever its w."""
    memory, slices = filled(LAYOUT)
    before = digest(memory, LAYOUT)
    words = LAYOUT.slice_bytes // 8
    for first in range(words):
        for second in range(first):
            slices[0, 0, 1, [8 * first + 7, 8 * second + 7]] ^= 0x80
            assert digest(memory, LAYOUT) != before
            slices[0, 0, 1, [8 * first + 7, 8 * second + 7]] ^= 0x80


def test_the_same_bits_in_several_layers_do_not_cancel() -> None:
    memory, slices = filled(LAYOUT)
    before = digest(memory, LAYOUT)
    for bit in range(64):
        slices[0:2, 0, 1, bit // 8] ^= np.uint8(1 << bit % 8)
        assert digest(memory, LAYOUT) != before
        slices[0:2, 0, 1, bit // 8] ^= np.uint8(1 << bit % 8)


PLACES = st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 3))


@given(PLACES, PLACES, st.integers(0, 99))
def test_swapped_slices_are_seen(one: tuple[int, int, int], other: tuple[int, int, int], seed: int) -> None:
    """Keys for values, one layer's for another's, or one block's for another's."""
    memory, slices = filled(LAYOUT, seed)
    blocks = [BlockId(block) for block in range(LAYOUT.blocks)]
    before = block_digests(memory, LAYOUT, blocks)
    slices[one], slices[other] = slices[other].copy(), slices[one].copy()
    after = block_digests(memory, LAYOUT, blocks)
    changed = {block for block in blocks if before[block] != after[block]}
    assert changed == (set() if one == other else {one[2], other[2]})


@given(st.integers(1, LAYOUT.slice_bytes // 8 - 1), st.integers(0, 99))
def test_shifted_words_are_seen(by: int, seed: int) -> None:
    memory, slices = filled(LAYOUT, seed)
    before = digest(memory, LAYOUT)
    slices[1, 0, 1] = np.roll(slices[1, 0, 1], 8 * by)
    assert digest(memory, LAYOUT) != before


@given(st.integers(0, LAYOUT.slice_bytes - 1), st.booleans(), st.integers(0, 99))
def test_a_truncated_slice_is_seen(begin: int, is_stale: bool, seed: int) -> None:
    """The rest is zeros, or what was there before."""
    memory, slices = filled(LAYOUT, seed)
    before, tail = digest(memory, LAYOUT), slices[2, 0, 1, begin:].copy()
    slices[2, 0, 1, begin:] = slices[2, 0, 2, begin:] if is_stale else 0
    assert (digest(memory, LAYOUT) == before) == bool((slices[2, 0, 1, begin:] == tail).all())


def test_a_block_that_was_never_written_is_seen() -> None:
    memory, slices = filled(LAYOUT)
    before = digest(memory, LAYOUT)
    slices[:, :, 1] = 0
    assert digest(memory, LAYOUT) == 0 != before


WIDE = replace(LAYOUT, blocks=40, kv_heads=1024)
MANY, _ = filled(WIDE)
ALONE = [digest(MANY, WIDE, block) for block in range(WIDE.blocks)]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 39), max_size=60))
def test_which_blocks_are_asked_for_together_changes_nothing(blocks: list[int]) -> None:
    """Runs, gaps, repetitions, any order, and more than a batch."""
    assert WIDE.slice_bytes * WIDE.blocks > BATCH_BYTES
    assert block_digests(MANY, WIDE, [BlockId(block) for block in blocks]) == [ALONE[block] for block in blocks]


def test_a_slice_is_filled_up_with_zeros() -> None:
    odd = np.arange(1, 11, dtype=np.uint8)[None]
    assert slice_digests(odd) == slice_digests(np.pad(odd, ((0, 0), (0, 6))))


def test_a_host_region_digests_what_lies_in_it_now() -> None:
    region = HostRegion.allocate(LAYOUT)
    try:
        assert list(region.digests([BlockId(0), BlockId(3)])) == [0, 0]
        region.writable(1, 1, 3, 1)[:] = bytes(range(LAYOUT.slice_bytes))
        first, changed = region.digests([BlockId(0), BlockId(3)])
        assert first == 0 != changed
        assert not region.digests([])
    finally:
        region.close()
