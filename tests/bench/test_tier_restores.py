"""The benchmark of restores, small: with the real file, memory and codec."""

from pathlib import Path

import pytest

from baton.layout import KVLayout
from bench.models import Shape
from bench.tiers.restores import Case, RestoreSpeed, measure, pool_of, restore_rates, restore_rig
from kvcache.tiers.interface import StorageFormat
from kvcache.tiers.io.interface import IoSizes

LAYOUT = KVLayout(layers=2, blocks=42, block_tokens=16, kv_heads=2, head_dim=16, dtype="float32")  # whole pages


@pytest.mark.parametrize("storage", ["none", "int8"])
@pytest.mark.parametrize(
    "case", [Case("ddr"), Case("ddr", "always"), Case("ssd"), Case("ssd", sizes=IoSizes(read_bytes=4096))]
)
def test_what_is_measured_came_up_right(case: Case, storage: StorageFormat, tmp_path: Path) -> None:
    speed: RestoreSpeed = measure(LAYOUT, tmp_path, case, storage, runs=2)
    assert speed.gb_per_s > 0 and 0 < speed.first_layer_s <= speed.whole_s
    assert not list(tmp_path.iterdir()), "the file is gone"


def test_rates_are_of_both_tiers(tmp_path: Path) -> None:
    shape = Shape(layers=2, hidden=64, heads=4, kv_heads=2)
    rates = restore_rates(shape, tmp_path, 2**18, "none")
    assert [rate.source for rate in rates] == ["ddr", "ddr", "ssd"] and all(rate.gb_per_s > 0 for rate in rates)
    layout = pool_of(shape, 2**18)
    assert layout.pool_blocks * 4 // 5 * layout.block_bytes == 2**18


def test_a_restore_that_is_not_right_is_no_measurement(tmp_path: Path) -> None:
    with restore_rig(LAYOUT, tmp_path, Case("ddr", "always")) as rig:
        rig.digests = [*rig.digests[:5], rig.digests[5] ^ 1, *rig.digests[6:]]
        with pytest.raises(AssertionError, match="digest is another"):
            rig.restore("ddr", 30)
