"""DeviceRegion on the CPU device: the staging and its bookkeeping, without the streams."""

import pytest
import torch

from baton.layout import KVLayout
from engine.device_region import DeviceRegion
from engine.runner import region_tensor
from kvtransfer.interface import Region

LAYOUT = KVLayout(layers=2, blocks=5, block_tokens=2, kv_heads=2, head_dim=4, dtype="bfloat16")


@pytest.fixture
def region() -> DeviceRegion:
    region = DeviceRegion(LAYOUT, torch.device("cpu"))
    region.tensor.copy_(torch.arange(region.tensor.numel()).view(LAYOUT.shape))
    return region


def test_it_is_a_region_that_nobody_maps(region: DeviceRegion) -> None:
    as_region: Region = region
    assert as_region.share() is None and not as_region.is_host
    assert region_tensor(region) is region.tensor


def test_readable_is_a_copy_of_the_slices(region: DeviceRegion) -> None:
    view = region.readable(1, 0, 2, 3)
    assert len(view) == 3 * LAYOUT.slice_bytes
    assert bytes(view) == region.tensor[1, 0, 2:5].view(torch.uint8).numpy().tobytes()
    before = bytes(view)
    region.tensor.zero_()
    assert bytes(view) == before


def test_what_is_written_lands_at_written_and_nowhere_else(region: DeviceRegion) -> None:
    before, source = region.tensor.clone(), region.readable(0, 1, 0, 2)
    view = region.writable(1, 1, 3, 2)
    view[:] = source
    assert torch.equal(region.tensor, before)
    region.written(1, 1, 3, 2, view)
    assert torch.equal(region.tensor[1, 1, 3:5], before[0, 1, 0:2])
    region.tensor[1, 1, 3:5] = before[1, 1, 3:5]
    assert torch.equal(region.tensor, before)


def test_two_writers_do_not_share_staging(region: DeviceRegion) -> None:
    one, two = region.writable(0, 0, 0, 1), region.writable(0, 0, 1, 1)
    one[:], two[:] = b"\x01" * len(one), b"\x02" * len(two)
    region.written(0, 0, 1, 1, two)
    region.written(0, 0, 0, 1, one)
    assert set(bytes(region.readable(0, 0, 0, 1))) == {1}
    assert set(bytes(region.readable(0, 0, 1, 1))) == {2}


def test_close_lets_the_memory_go(region: DeviceRegion) -> None:
    region.close()
    assert region.tensor.numel() == 0
