"""The decode side: listens, and lets each connection fill the region under the ticket that it proved."""

import asyncio
import socket
from collections.abc import Sequence
from typing import cast

from baton.clock import monotonic
from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from kvtransfer.interface import Offer, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.tcp.inlet import PATIENCE, Inlet, Patience
from kvtransfer.tcp.wire import TRANSPORT, Address
from kvtransfer.tickets import TicketBook

CONNECTIONS_MAX = 4096
UNAUTHENTICATED_MAX = 256
"""Of these; past either bound a new connection is closed at once."""
BACKLOG = 1024
SCRATCH_BYTES = 256 * 1024
"""Where bytes go that must not land; all connections write there and nobody reads."""


class TcpReceiver:
    """`port` 0 picks a free one; `advertise_host` is what peers connect to."""

    def __init__(
        self,
        region: Region,
        host: str,
        port: int,
        advertise_host: str,
        metrics: TransferMetrics,
        patience: Patience = PATIENCE,
    ) -> None:
        self._host, self._port, self._advertise_host = host, port, advertise_host
        self._region, self._metrics, self._patience = region, metrics, patience
        self._tickets = TicketBook()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._inflows: set[_Inflow] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def port(self) -> int:
        assert self._server is not None, "start() comes first"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]  # one socket: with port 0 each would get a port of its own
            listener = socket.create_server(address, family=family, backlog=BACKLOG)
            self._server = await loop.create_server(lambda: _Inflow(self), sock=listener, backlog=BACKLOG)
        except OSError as error:
            raise TransferError(f"KV blocks cannot come in at {self._host}:{self._port}: {error.strerror}.") from None
        self._sweep_later()

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        ticket = self._tickets.open(request_id, blocks)
        address = Address(self._advertise_host, self.port, ticket.number, ticket.secret)
        return (Offer(TRANSPORT, address.pack()),)

    def close_ticket(self, request_id: RequestId) -> None:
        self._tickets.close(request_id)

    async def settle(self, request_id: RequestId) -> None:
        """At once: nothing lands without this process, which asks the ticket before each copy."""

    async def close(self) -> None:
        self._tickets.close_all()
        if self._server is None:
            return
        if self._sweep is not None:
            self._sweep.cancel()
        self._server.close()
        inflows = tuple(self._inflows)
        for inflow in inflows:
            inflow.cut()
        await self._server.wait_closed()
        for inflow in inflows:
            await inflow.ended.wait()

    # ---- for its connections

    def welcome(self, inflow: "_Inflow") -> bool:
        """Whether there is room for one more connection."""
        unauthenticated = sum(not other.inlet.is_authenticated for other in self._inflows)
        if len(self._inflows) >= CONNECTIONS_MAX or unauthenticated >= UNAUTHENTICATED_MAX:
            self._metrics.failed(TRANSPORT, "in")
            return False
        self._inflows.add(inflow)
        return True

    def forget(self, inflow: "_Inflow") -> None:
        self._inflows.discard(inflow)

    def inlet(self, transport: asyncio.Transport) -> Inlet:
        answer = transport.write
        return Inlet(self._region, self._tickets, self._scratch, answer, self._metrics, monotonic, self._patience)

    def _sweep_later(self) -> None:
        patience = self._patience
        interval_s = min(patience.hello_s, patience.stall_s, patience.idle_s, patience.linger_s) / 2
        self._sweep = asyncio.get_running_loop().call_later(interval_s, self._cut_the_overdue)

    def _cut_the_overdue(self) -> None:
        for inflow in tuple(self._inflows):
            if inflow.inlet.is_overdue():
                inflow.cut()
        self._sweep_later()


class _Inflow(asyncio.BufferedProtocol):
    """One connection: carries bytes from the socket to where its inlet wants them."""

    inlet: Inlet

    def __init__(self, receiver: TcpReceiver) -> None:
        self._receiver = receiver
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not of that class
        self.inlet = self._receiver.inlet(self._transport)
        if not self._receiver.welcome(self):
            self._transport.abort()
            return
        # Buffer sizes are the kernel's: setting them would end its tuning, which may go further than we may.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self.inlet.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.inlet.filled(nbytes)

    def pause_writing(self) -> None:
        """The peer does not read its answers: nothing more is taken from it until it does."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        del error  # the sender reports it; here it is one connection less
        self._receiver.forget(self)
        self.inlet.close()
        self.ended.set()

    def cut(self) -> None:
        self._transport.abort()
