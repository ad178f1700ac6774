"""The benchmark of restores, small: with the real file, memory and codec."""

from pathlib import Path

import pytest

from baton.layout import KVLayout
from bench.restore import measure_restores, restore_rig
from kvcache.tiers.interface import StorageFormat

LAYOUT = KVLayout(layers=2, blocks=42, block_tokens=16, kv_heads=2, head_dim=16, dtype="float32")  # whole pages


@pytest.mark.parametrize("storage", ["none", "int8"])
def test_what_is_measured_came_up_right(storage: StorageFormat, tmp_path: Path) -> None:
    speeds = measure_restores(LAYOUT, 30, tmp_path, storage, runs=2)
    assert [speed.source.split(",")[0] for speed in speeds] == ["ddr", "ddr", "ddr", "ssd"]
    assert all(speed.gb_per_s > 0 and speed.first_layer_s > 0 for speed in speeds)
    assert not list(tmp_path.iterdir()), "the file is gone"


def test_a_restore_that_is_not_right_is_no_measurement(tmp_path: Path) -> None:
    with restore_rig(LAYOUT, tmp_path, "always") as rig:
        rig.digests = [*rig.digests[:5], rig.digests[5] ^ 1, *rig.digests[6:]]
        with pytest.raises(AssertionError, match="digest is another"):
            rig.restore("ddr", 30)
