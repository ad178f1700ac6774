"""The engine's device memory, as NIXL is told of it; where there is a GPU, moved by it."""

import asyncio

import pytest
import torch
from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, ids

from baton.errors import TransferError
from engine.device_region import DeviceRegion
from kvtransfer.nixl.package import installed
from kvtransfer.nixl.segment import DeviceMemory, segment_of
from kvtransfer.registry import make_ports


def test_a_device_region_on_the_cpu_is_for_other_transports() -> None:
    region = DeviceRegion(SOURCE_LAYOUT, torch.device("cpu"))
    assert isinstance(region, DeviceMemory)
    region.mark(1)
    region.ready(1)
    with pytest.raises(TransferError, match="NIXL cannot reach"):
        segment_of(region)


@pytest.mark.skipif(not torch.cuda.is_available() or installed() is None, reason="needs a GPU and NIXL")
def test_blocks_go_from_device_memory_to_device_memory() -> None:
    async def scenario() -> None:
        device = torch.device("cuda", 0)
        source, target = DeviceRegion(SOURCE_LAYOUT, device), DeviceRegion(TARGET_LAYOUT, device)
        sender, receiver = (make_ports(["nixl"], region, CollectorRegistry()) for region in (source, target))
        await receiver.start("nixl")
        connection = await sender.connect(REQUEST, [receiver.open("nixl", REQUEST, ids(5, 9))], TARGET_LAYOUT)
        for layer in range(SOURCE_LAYOUT.layers):
            source.tensor[layer].normal_()
            source.mark(layer)
            await connection.write(layer, ids(1, 2), ids(9, 5))
        await connection.fence()
        assert (target.tensor[:, :, [9, 5]] == source.tensor[:, :, [1, 2]]).all()
        assert not target.tensor[:, :, [0, 1, 2, 3, 4]].any()
        await sender.close()
        await receiver.close()

    asyncio.run(scenario())
