"""Two ends of a transport in one process, and memory whose every byte can be told from every other."""

import gc
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Connection, Offer
from kvtransfer.region import HostRegion
from kvtransfer.registry import Ports, make_ports

REQUEST = RequestId("req-1")
SOURCE_LAYOUT = KVLayout(layers=3, blocks=19, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")
TARGET_LAYOUT = KVLayout(layers=3, blocks=32, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")


class StagedRegion(HostRegion):
    """As device memory looks to transports: what they see are copies."""

    is_host = False

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        return memoryview(bytes(super().readable(layer, kv, first_block, blocks)))

    def writable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        del layer, kv, first_block
        return memoryview(bytearray(blocks * self.layout.slice_bytes))

    def written(self, layer: int, kv: int, first_block: int, blocks: int, view: memoryview) -> None:
        HostRegion.writable(self, layer, kv, first_block, blocks)[:] = view

    def share(self) -> None:
        """No other process maps a device's memory."""


def slices(region: HostRegion) -> NDArray[np.uint8]:
    """The region as `[layer][k|v][block][byte]`."""
    layout = region.layout
    return np.frombuffer(region.memory, np.uint8).reshape(layout.layers, 2, layout.blocks, layout.slice_bytes)


def fill_random(region: HostRegion, seed: int) -> None:
    slices(region)[:] = np.random.default_rng(seed).integers(0, 256, slices(region).shape, np.uint8)


def ids(*numbers: int) -> tuple[BlockId, ...]:
    return tuple(map(BlockId, numbers))


@dataclass(slots=True)
class Pair:
    source: HostRegion
    target: HostRegion
    transport: str
    receiver: Ports
    sender: Ports
    sent: CollectorRegistry
    received: CollectorRegistry

    async def connect(self, blocks: Sequence[BlockId], request_id: RequestId = REQUEST) -> Connection:
        return await self.sender.connect(request_id, [self.open(blocks, request_id)], self.target.layout)

    def open(self, blocks: Sequence[BlockId], request_id: RequestId = REQUEST) -> Offer:
        return self.receiver.open(self.transport, request_id, blocks)


@asynccontextmanager
async def pair(
    transport: str,
    source_layout: KVLayout = SOURCE_LAYOUT,
    target_layout: KVLayout = TARGET_LAYOUT,
    source_kind: type[HostRegion] = HostRegion,
    target_kind: type[HostRegion] = HostRegion,
) -> AsyncIterator[Pair]:
    source, target = source_kind.allocate(source_layout), target_kind.allocate(target_layout)
    fill_random(source, seed=1)
    hub, sent, received = InprocHub(), CollectorRegistry(), CollectorRegistry()
    receiver = make_ports([transport], target, received, hub=hub)
    sender = make_ports([transport], source, sent, hub=hub)
    await receiver.start(transport)
    try:
        yield Pair(source, target, transport, receiver, sender, sent, received)
    finally:
        await sender.close()
        await receiver.close()
        source.close()
        target.close()


def tampered(offer: Offer, position: int) -> Offer:
    """One byte of the descriptor is another."""
    data = bytearray(offer.descriptor)
    data[position] ^= 0x5A
    return Offer(offer.transport, bytes(data))


def open_fds() -> set[str]:
    gc.collect()  # what an earlier test's exceptions held
    return set(os.listdir("/proc/self/fd"))


def transfer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]


def is_mapped() -> bool:
    """Whether any shared KV memory is mapped in this process."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        return "memfd:baton-kv" in maps.read()
