"""What the other process does in the two-process tests."""

import asyncio
from multiprocessing.connection import Connection as Pipe

from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, fill_random, ids

from baton.layout import KVLayout
from kvtransfer.interface import Offer
from kvtransfer.region import HostRegion
from kvtransfer.registry import make_ports

LARGE = KVLayout(layers=1, blocks=64, block_tokens=64, kv_heads=8, head_dim=128, dtype="float32")
SEED = 11


def send_blocks(pipe: Pipe, transport: str) -> None:
    """Takes offers; writes its first blocks to those asked for, in each layer; says how it went."""

    async def main() -> None:
        source = HostRegion.allocate(SOURCE_LAYOUT)
        fill_random(source, SEED)
        sender = make_ports([transport], source, CollectorRegistry())
        offers, target = pipe.recv()
        connection = await sender.connect(REQUEST, [Offer(*offer) for offer in offers], TARGET_LAYOUT)
        for layer in range(SOURCE_LAYOUT.layers):
            await connection.write(layer, ids(*range(len(target))), ids(*target))
        await connection.fence()
        await connection.close()
        pipe.send((connection.transport, connection.bytes_written))
        await sender.close()
        source.close()

    asyncio.run(main())


def send_for_ever(pipe: Pipe, transport: str) -> None:
    """Writes large blocks over and over, and says so after the first."""

    async def main() -> None:
        source = HostRegion.allocate(LARGE)
        source.memory[:] = b"\xee" * source.memory.nbytes
        sender = make_ports([transport], source, CollectorRegistry())
        offers, target = pipe.recv()
        connection = await sender.connect(REQUEST, [Offer(*offer) for offer in offers], LARGE)
        await connection.write(0, ids(*target), ids(*target))
        await connection.fence()
        pipe.send("writing")
        while True:
            await connection.write(0, ids(*target), ids(*target))

    asyncio.run(main())


def receive_for_ever(pipe: Pipe, transport: str) -> None:
    """Offers all its large blocks and waits to be killed."""

    async def main() -> None:
        region = HostRegion.allocate(LARGE)
        receiver = make_ports([transport], region, CollectorRegistry())
        await receiver.start(transport)
        offer = receiver.open(transport, REQUEST, ids(*range(LARGE.blocks)))
        pipe.send([(offer.transport, offer.descriptor)])
        await asyncio.Event().wait()

    asyncio.run(main())
