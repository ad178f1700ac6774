from dataclasses import replace

import pytest

from baton.layout import KVLayout

LAYOUT = KVLayout(layers=3, blocks=5, block_tokens=4, kv_heads=2, head_dim=8, dtype="bfloat16")


def test_slices_tile_the_region_in_the_order_of_its_shape() -> None:
    offsets = [LAYOUT.slice_offset(layer, kv, block) for layer in range(3) for kv in range(2) for block in range(5)]
    assert offsets == list(range(0, LAYOUT.region_bytes, LAYOUT.slice_bytes))


def test_bytes_add_up() -> None:
    assert LAYOUT.slice_bytes == 4 * 2 * 8 * 2
    assert LAYOUT.block_bytes == 3 * 2 * LAYOUT.slice_bytes
    assert LAYOUT.region_bytes == 5 * LAYOUT.block_bytes
    assert LAYOUT.shape == (3, 2, 5, 4, 2, 8)


@pytest.mark.parametrize(("layer", "kv", "block"), [(3, 0, 0), (0, 2, 0), (0, 0, 5), (-1, 0, 0), (0, 0, -1)])
def test_a_place_outside_is_our_own_bug(layer: int, kv: int, block: int) -> None:
    with pytest.raises(AssertionError):
        LAYOUT.slice_offset(layer, kv, block)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert LAYOUT.blocks_for(tokens) == blocks


def test_only_the_number_of_blocks_may_differ_between_compatible_layouts() -> None:
    assert LAYOUT.is_compatible(replace(LAYOUT, blocks=99))
    for name in ("layers", "block_tokens", "kv_heads", "head_dim"):
        assert not LAYOUT.is_compatible(replace(LAYOUT, **{name: 1}))
    assert not LAYOUT.is_compatible(replace(LAYOUT, dtype="float16"))


def test_kv_can_be_cut_into_blocks_of_another_size_and_nothing_else() -> None:
    assert LAYOUT.unconvertible(replace(LAYOUT, blocks=99, block_tokens=24)) is None
    for name in ("layers", "kv_heads", "head_dim"):
        assert f"{name} {getattr(LAYOUT, name)} and 1;" in str(LAYOUT.unconvertible(replace(LAYOUT, **{name: 1})))
    reason = LAYOUT.unconvertible(replace(LAYOUT, dtype="float16", layers=1, block_tokens=8))
    assert reason == (
        "The KV layouts of sender and receiver differ: layers 3 and 1, dtype bfloat16 and float16; "
        "all but block_tokens must be equal."
    )
