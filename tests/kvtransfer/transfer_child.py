"""What the other process does in the two-process tests."""

import asyncio
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe

from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, fill_random, ids

from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.interface import Connection, Offer
from kvtransfer.region import HostRegion
from kvtransfer.registry import make_ports

LARGE = KVLayout(layers=1, blocks=64, block_tokens=64, kv_heads=8, head_dim=128, dtype="float32")
SMALL = KVLayout(layers=1, blocks=16, block_tokens=64, kv_heads=8, head_dim=128, dtype="float32")
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


def send_until_closed(pipe: Pipe, transport: str) -> None:
    """For each ticket writes its blocks over and over, says so before, and then why it had to end."""

    async def main() -> None:
        source = HostRegion.allocate(SMALL)
        source.memory[:] = b"\xee" * source.memory.nbytes
        sender = make_ports([transport], source, CollectorRegistry())
        while asked := pipe.recv():
            offers, target = asked
            connection = await sender.connect(REQUEST, [Offer(*offer) for offer in offers], SMALL)
            pipe.send("writing")
            pipe.send(await reason_to_end(connection, target))
            await connection.close()
        await sender.close()
        source.close()

    async def reason_to_end(connection: Connection, target: Sequence[BlockId]) -> str:
        try:
            while True:
                await connection.write(0, target, target)
        except TransferError as error:
            return str(error)

    asyncio.run(main())


class Halting(HostRegion):
    """Its process stops itself in the middle of the second copy out of it."""

    is_host = False  # so that it is read copy by copy
    reads = 0

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        self.reads += 1
        if self.reads == 2:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this very thread goes no further
        return super().readable(layer, kv, first_block, blocks)


def send_and_halt(pipe: Pipe, transport: str) -> None:
    """Writes two blocks that do not adjoin, is stopped on the way, and says what came of it."""

    async def main() -> None:
        source = Halting.allocate(SOURCE_LAYOUT)
        fill_random(source, SEED)
        sender = make_ports([transport], source, CollectorRegistry())
        offers, target = pipe.recv()
        connection = await sender.connect(REQUEST, [Offer(*offer) for offer in offers], TARGET_LAYOUT)
        try:
            await connection.write(0, ids(1, 3), ids(*target))
            pipe.send("written")
        except TransferError as error:
            pipe.send(str(error))
        await sender.close()
        source.close()

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
