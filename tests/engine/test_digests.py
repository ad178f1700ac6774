"""Digests by torch, which must be those that numpy makes of the same bytes."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.digest import sum_of
from baton.ids import BlockId
from baton.layout import KVLayout
from engine import digests
from engine.device_region import DeviceRegion
from engine.digests import DeviceDigester, RegionDigester
from engine.runner import region_tensor
from kvtransfer.region import HostRegion

LAYOUTS = [
    KVLayout(layers=3, blocks=9, block_tokens=4, kv_heads=2, head_dim=8, dtype="bfloat16"),
    KVLayout(layers=2, blocks=9, block_tokens=4, kv_heads=1, head_dim=4, dtype="float32"),
    KVLayout(layers=2, blocks=9, block_tokens=1, kv_heads=1, head_dim=5, dtype="float16"),
]
"""Of the last one slices are no whole words."""


def filled(layout: KVLayout) -> HostRegion:
    region = HostRegion.allocate(layout)
    tensor = region_tensor(region)
    tensor.view(torch.int8).random_(generator=torch.Generator().manual_seed(0))
    return region


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.dtype)
def region(request: pytest.FixtureRequest) -> Iterator[HostRegion]:
    region = filled(request.param)
    yield region
    region.close()


@given(blocks=st.lists(st.integers(0, 8), max_size=12).map(lambda blocks: list(map(BlockId, blocks))))
def test_they_are_numpys(region: HostRegion, blocks: Sequence[BlockId]) -> None:
    begun = DeviceDigester(region_tensor(region)).begin(blocks)
    assert begun.is_done
    assert begun.wait() == tuple(region.digests(blocks)) == RegionDigester(region).begin(blocks).wait()


@pytest.mark.parametrize("batch_bytes", [1, 600, 2**20])
def test_how_much_is_digested_at_a_time_changes_nothing(
    region: HostRegion, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [BlockId(block) for block in (4, 5, 6, 7)]
    monkeypatch.setattr(digests, "HOST_BATCH_BYTES", batch_bytes)
    assert DeviceDigester(region_tensor(region)).begin(blocks).wait() == tuple(region.digests(blocks))


@pytest.mark.parametrize("batch_bytes", [1, 2**20])
def test_what_layers_add_makes_up_the_whole(
    region: HostRegion, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "HOST_BATCH_BYTES", batch_bytes)
    device = DeviceRegion(region.layout, torch.device("cpu"))
    device.tensor.copy_(region_tensor(region))
    blocks = [BlockId(4), BlockId(0)]
    cuts = [range(1), range(1, region.layout.layers)]
    parts = [device.digests(blocks, layers) for layers in cuts]
    assert parts == [tuple(region.digests(blocks, layers)) for layers in cuts]
    assert [sum_of(*both) for both in zip(*parts, strict=True)] == region.digests(blocks)
    device.close()


def test_products_are_summed_as_matrices_are_multiplied() -> None:
    """What a device without products of integer matrices does instead."""
    words = torch.randint(-(2**62), 2**62, (2, 3, 5))
    weights = torch.randint(-(2**62), 2**62, (5,))
    assert torch.equal((words * weights).sum(-1), digests._dot(words, weights))


def test_a_device_region_digests_what_a_host_region_does(region: HostRegion) -> None:
    device = DeviceRegion(region.layout, torch.device("cpu"))
    device.tensor.copy_(region_tensor(region))
    blocks = [BlockId(8), BlockId(0), BlockId(3)]
    assert list(device.digests(blocks)) == region.digests(blocks) == list(device.digester.begin(blocks).wait())
    device.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_they_are_the_same(region: HostRegion) -> None:
    device = DeviceRegion(region.layout, torch.device("cuda"))
    device.tensor.copy_(region_tensor(region))
    blocks = [BlockId(8), BlockId(0), BlockId(3)]
    begun = device.digester.begin(blocks)
    assert list(begun.wait()) == region.digests(blocks) == list(device.digests(blocks))
    assert begun.is_done
    device.close()
