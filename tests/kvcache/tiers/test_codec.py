"""Compressed KV comes back within half a step of what it was, layer by layer, or is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from baton.layout import KVLayout
from kvcache.tiers.interface import Rows, Slot
from kvcache.tiers.rows.codec import SCALE_MIN, Int8Codec, codec_for
from kvcache.tiers.rows.host_memory import HostMemory
from kvcache.tiers.rows.narrow_floats import LARGEST, narrow, widened

DTYPES = ("float32", "float16", "bfloat16")
ULP = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Rounding to the dtype, relative; and in float16's subnormals half of the least one."""
SUBNORMAL = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}


def layout_of(dtype: str, *, layers: int = 3, head_dim: int = 8) -> KVLayout:
    return KVLayout(layers=layers, blocks=9, block_tokens=4, kv_heads=3, head_dim=head_dim, dtype=dtype)


def blocks_of(numbers: NDArray[np.floating], layout: KVLayout) -> Rows:
    """[block][layer][k|v][token][head][dim] as rows of the layout's dtype."""
    rows = HostMemory(len(numbers), layout.block_bytes).rows
    narrow(np.ascontiguousarray(numbers, np.float32).reshape(len(numbers), -1), rows, layout.dtype)
    return rows


def numbers_of(rows: Rows, layout: KVLayout) -> NDArray[np.float64]:
    shape = (len(rows), layout.layers, 2, *layout.shape[3:])
    return np.asarray(widened(np.ascontiguousarray(rows), layout.dtype), np.float64).reshape(shape)


def round_trip(blocks: Rows, layout: KVLayout) -> tuple[list[int], Rows]:
    codec = Int8Codec(layout)
    stored = HostMemory(len(blocks), codec.stored_bytes).rows
    slots = [Slot(slot) for slot in reversed(range(len(blocks)))]
    refused = codec.encode(blocks, stored, slots)
    back = HostMemory(len(blocks), layout.block_bytes).rows
    codec.decode(stored, slots, back)
    return refused, back


def bound(x: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Half a step, and the rounding of float32 and of the dtype."""
    largest: NDArray[np.float64] = np.abs(x).max(axis=(3, 5), keepdims=True)
    step: NDArray[np.float64] = np.maximum(largest / 127, SCALE_MIN)
    return step * (0.5 + 2.0**-15) + largest * (1 + 1 / 127) * ULP[dtype] + SUBNORMAL[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_within_half_a_step(dtype: str, data: st.DataObject) -> None:
    layout = layout_of(dtype, layers=1, head_dim=2)
    shape = (2, 1, 2, *layout.shape[3:])
    largest = float(LARGEST[dtype])
    numbers = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-largest, largest, width=32)))
    blocks = blocks_of(numbers, layout)
    refused, back = round_trip(blocks, layout)
    assert refused == []
    x, y = numbers_of(blocks, layout), numbers_of(back, layout)
    assert np.isfinite(y).all()
    assert (np.abs(x - y) <= bound(x, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_have_scales_of_their_own(dtype: str) -> None:
    layout = layout_of(dtype)
    numbers = np.random.default_rng(3).standard_normal((5, 3, 2, *layout.shape[3:]))
    numbers *= 10.0 ** np.arange(-3, 0)[:, None]  # a head a hundred times as large as another
    blocks = blocks_of(numbers.astype(np.float32), layout)
    _, back = round_trip(blocks, layout)
    x, y = numbers_of(blocks, layout), numbers_of(back, layout)
    assert (np.abs(x - y) <= bound(x, dtype)).all()
    assert np.abs(x - y).max(axis=(0, 1, 2, 3, 5))[0] < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_zeros_and_the_largest_is_itself(dtype: str) -> None:
    layout = layout_of(dtype)
    numbers = np.zeros((2, 3, 2, *layout.shape[3:]), np.float32)
    numbers[1, :, :, 2, :, 5] = -2.0
    blocks = blocks_of(numbers, layout)
    refused, back = round_trip(blocks, layout)
    assert refused == []
    assert np.allclose(numbers_of(back, layout), numbers, rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(dtype: str, poison: float) -> None:
    layout = layout_of(dtype)
    blocks = blocks_of(np.ones((4, 3, 2, *layout.shape[3:]), np.float32), layout)
    if dtype == "bfloat16":
        bits = np.array([poison], np.float32).view(np.uint16)[1:]
        blocks[2].view(np.uint16)[-1:] = bits
    else:
        blocks[2].view(dtype)[-1] = poison
    refused, back = round_trip(blocks, layout)
    assert refused == [2]
    assert np.allclose(numbers_of(back[[0, 1, 3]], layout), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_are_decoded_from_their_own_bytes(dtype: str) -> None:
    layout = layout_of(dtype)
    codec = Int8Codec(layout)
    blocks = blocks_of(np.random.default_rng(4).standard_normal((1, 3, 2, *layout.shape[3:])), layout)
    stored = HostMemory(1, codec.stored_bytes).rows
    codec.encode(blocks, stored, [Slot(0)])
    whole, one = (HostMemory(1, layout.block_bytes).rows for _ in range(2))
    codec.decode(stored, [Slot(0)], whole)
    layer_bytes, stored_layer_bytes = layout.block_bytes // 3, codec.stored_bytes // 3
    stored[0, :stored_layer_bytes] = stored[0, 2 * stored_layer_bytes :] = 255
    one[:] = 7
    codec.decode(stored, [Slot(0)], one, range(1, 2))
    middle = slice(layer_bytes, 2 * layer_bytes)
    assert np.array_equal(one[0, middle], whole[0, middle])
    assert (np.delete(one[0], np.arange(layer_bytes, 2 * layer_bytes)) == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_change_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(dtype, layers=7)
    blocks = blocks_of(np.random.default_rng(5).standard_normal((2, 7, 2, *layout.shape[3:])), layout)
    whole = round_trip(blocks, layout)[1]
    monkeypatch.setattr("kvcache.tiers.rows.codec.BATCH_NUMBERS", 4 * 96)
    assert np.array_equal(round_trip(blocks, layout)[1], whole)


def test_stored_bytes_are_what_they_should_be_and_all_written() -> None:
    layout = KVLayout(layers=8, blocks=9, block_tokens=16, kv_heads=3, head_dim=64, dtype="float32")
    codec = Int8Codec(layout)
    assert codec.stored_bytes == 16 * (16 + 16 * 3 * 64)  # 12 bytes of scales and 4 to fill up
    blocks = blocks_of(np.random.default_rng(6).standard_normal((1, 8, 2, *layout.shape[3:])), layout)
    stored = [HostMemory(1, codec.stored_bytes).rows for _ in range(2)]
    stored[1][:] = 255
    for rows in stored:
        assert codec.encode(blocks, rows, [Slot(0)]) == []
    assert np.array_equal(stored[0], stored[1])


def test_which_codec() -> None:
    assert codec_for("none", layout_of("float16")) is None
    codec = codec_for("int8", layout_of("float16"))
    assert codec is not None and codec.storage == "int8"


@pytest.mark.parametrize("pattern", [np.arange(2**16, dtype=np.uint16)])
def test_every_half_is_widened_and_narrowed_right(pattern: NDArray[np.uint16]) -> None:
    halves = pattern[np.isfinite(pattern.view(np.float16))]
    wide = widened(halves.view(np.uint8), "float16")
    assert np.array_equal(wide, halves.view(np.float16).astype(np.float32))
    back = np.empty(halves.nbytes, np.uint8)
    narrow(wide, back, "float16")
    assert np.array_equal(back.view(np.uint16), halves)
    between = np.random.default_rng(8).uniform(-65504, 65504, 100_000).astype(np.float32)
    rounded = np.empty(2 * len(between), np.uint8)
    narrow(between, rounded, "float16")
    assert np.array_equal(rounded.view(np.float16), between.astype(np.float16))
