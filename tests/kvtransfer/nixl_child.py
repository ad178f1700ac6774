"""The other process of nixl's tests where it must stop at the worst moment."""

import asyncio
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe

from prometheus_client import CollectorRegistry
from transfer_child import LARGE
from transfer_rig import REQUEST, ids

from baton.ids import BlockId
from kvtransfer.interface import Offer
from kvtransfer.nixl import sender as nixl_sender
from kvtransfer.nixl.agent import Agent
from kvtransfer.nixl.wire import Kind
from kvtransfer.region import HostRegion
from kvtransfer.registry import make_ports


class StopsOnceAnnounced(nixl_sender.NixlConnection):
    """Stops its own process once it has said what may be read. Its end does nothing for these reads until the process
    is continued, so over tcp none of them ends before."""

    _fences = 0

    async def _fence(self) -> None:
        await super()._fence()
        self._fences += 1

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        if self.bytes_written:
            Agent.progress = lambda _: None  # type: ignore[method-assign]
        await super()._write(layer, source, target)

    async def _answer(self, kind: Kind) -> None:
        if kind == Kind.READ and self._fences:
            os.kill(os.getpid(), signal.SIGSTOP)
            Agent.progress = PROGRESS  # type: ignore[method-assign]
        await super()._answer(kind)


PROGRESS = Agent.progress


def stop_while_read(pipe: Pipe, transport: str) -> None:
    """Fills block 0 of the offer, says so, and stops when it has announced all others."""

    async def main() -> None:
        source = HostRegion.allocate(LARGE)
        source.memory[:] = b"\xee" * source.memory.nbytes
        sender = make_ports([transport], source, CollectorRegistry())
        offers = pipe.recv()
        connection = await sender.connect(REQUEST, [Offer(*offer) for offer in offers], LARGE)
        await connection.write(0, ids(0), ids(0))
        await connection.fence()
        pipe.send("stopping")
        try:
            await connection.write(0, ids(*range(1, LARGE.blocks)), ids(*range(1, LARGE.blocks)))
            await connection.fence()
        finally:
            await sender.close()

    nixl_sender.NixlConnection = StopsOnceAnnounced  # type: ignore[misc]
    asyncio.run(main())
