"""Our transports in bench.transfer, one end a process."""

import sys
import time
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from baton.layout import PROBE_BLOCKS, KVLayout
from bench.transfer_end import Handlers, answer, fill, repeat, tails_checksum
from bench.transfer_plan import Form
from kvtransfer.interface import Connection, Offer
from kvtransfer.region import HostRegion
from kvtransfer.registry import make_ports

REQUEST = RequestId("bench")
KV_HEADS, HEAD_DIM, DTYPE, TOKEN_BYTES = 8, 128, "bfloat16", 8 * 128 * 2


class OwnEnd:
    """A worker's region and its end of one transport. It sends as workers do: layer by layer, then a fence."""

    def __init__(self, transport: str, form: Form) -> None:
        tokens = form.slice_bytes // TOKEN_BYTES
        layout = KVLayout(form.layers, form.blocks + PROBE_BLOCKS, tokens, KV_HEADS, HEAD_DIM, DTYPE)
        self._transport, self._layout = transport, layout
        self._region = HostRegion.allocate(layout)
        self._ports = make_ports([transport], self._region, CollectorRegistry())
        self._connection: Connection | None = None

    async def open(self) -> str:
        """Takes in whatever is written; its memory is warm."""
        memory = self._region.memory
        memory[:] = bytes(len(memory))
        await self._ports.start(self._transport)
        return self._ports.open(self._transport, REQUEST, _blocks(self._layout.pool_blocks)).descriptor.hex()

    async def connect(self, offer: str) -> None:
        fill(self._region.memory, self._layout.slice_bytes)
        offers = [Offer(self._transport, bytes.fromhex(offer))]
        self._connection = await self._ports.connect(REQUEST, offers, self._layout)

    async def move(self, layers: int, blocks: int, at_least_s: float, at_least: int) -> dict[str, Any]:
        connection, some = self._connection, _blocks(blocks)
        assert connection is not None

        async def once() -> None:
            for layer in range(layers):
                await connection.write(layer, some, some)
            await connection.fence()

        return await repeat(once, at_least_s, at_least)

    def check(self, layers: int, blocks: int) -> int:
        places = [(layer, kv, block) for layer in range(layers) for kv in (0, 1) for block in range(blocks)]
        return tails_checksum(self._region.readable(*place, 1) for place in places)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
        self._ports.close_ticket(REQUEST)
        await self._ports.close()
        self._region.close()


def _blocks(count: int) -> tuple[BlockId, ...]:
    return tuple(map(BlockId, range(count)))


async def main(transport: str, *form: str) -> None:
    end = OwnEnd(transport, Form(*map(int, form)))
    handlers: Handlers = {
        "open": end.open,
        "connect": end.connect,
        "move": end.move,
        "check": end.check,
        "cpu": time.process_time,
    }
    try:
        await answer(handlers, (TransferError,))
    finally:
        await end.close()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
