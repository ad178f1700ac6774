"""The receiving side: listens for senders, and reads what they have ready into their tickets' blocks."""

import asyncio
import socket
from collections import defaultdict
from collections.abc import Sequence

from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from kvtransfer.control import Address
from kvtransfer.interface import Offer
from kvtransfer.nixl.driver import Driver
from kvtransfer.nixl.inflow import PATIENCE, Inflow, Patience
from kvtransfer.nixl.package import TRANSPORT
from kvtransfer.nixl.peers import Peers
from kvtransfer.nixl.pipeline import Read, Unwanted
from kvtransfer.port import Place
from kvtransfer.tickets import Ticket, TicketBook

CONNECTIONS_MAX = 4096
UNPROVEN_MAX = 256
"""Of these; past either bound a new connection is closed at once."""
BACKLOG = 1024


class NixlReceiver:
    """Every write into this worker's region is a read that it issued itself, so what may still land it knows: when the
    reads of a ticket have ended, nothing can."""

    def __init__(self, place: Place, driver: Driver, patience: Patience = PATIENCE) -> None:
        self.place, self.driver, self.patience = place, driver, patience
        self.tickets = TicketBook()
        self.peers = Peers(driver)
        self._requests: dict[Ticket, RequestId] = {}
        self._reads: defaultdict[RequestId, set[asyncio.Future[None]]] = defaultdict(set)
        self._inflows: dict[Inflow, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._is_up = False

    @property
    def port(self) -> int:
        assert self._server is not None, "start() comes first"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        """Raises TransferError too where NIXL does not reach the region."""
        await self.driver.acquire()
        try:
            await self._listen()
        except OSError as error:
            await self.driver.release()
            raise TransferError(f"NIXL's senders cannot come in at {self.place.host}: {error.strerror}.") from None
        self._is_up = True

    async def _listen(self) -> None:
        """At one socket: with port 0 each would get a port of its own."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.place.host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
        self._server = await asyncio.start_server(self._serve, sock=listener, backlog=BACKLOG)

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        self.close_ticket(request_id)
        ticket = self.tickets.open(request_id, blocks)
        self._requests[ticket] = request_id
        address = Address(self.place.advertise_host, self.port, ticket.number, ticket.secret)
        return (Offer(TRANSPORT, address.pack()),)

    def close_ticket(self, request_id: RequestId) -> None:
        if ticket := self.tickets.close(request_id):
            del self._requests[ticket]
            for inflow in tuple(self._inflows):
                inflow.on_ticket_closed(ticket)

    async def settle(self, request_id: RequestId) -> None:
        """A read of a sender that is stopped, or cut off without the network saying so, may take until it is gone."""
        while reads := self._reads.get(request_id):
            await asyncio.wait(tuple(reads))

    async def close(self) -> None:
        if not self._is_up or self._server is None:
            return
        self._is_up = False
        self.tickets.close_all()
        self._requests.clear()
        self._server.close()
        for inflow in self._inflows:
            inflow.cut()
        if self._inflows:
            await asyncio.wait(tuple(self._inflows.values()))
        await self._server.wait_closed()
        self.peers.close()
        await self.driver.release()

    # ---- for its connections

    def begin(self, ticket: Ticket, read: Read) -> None:
        """Raises TransferError if the ticket was closed."""
        ticket.check(())
        reads = self._reads[request_id := self._requests[ticket]]
        reads.add(read.ended)
        self.peers.use(read.peer)
        read.ended.add_done_callback(lambda ended: self._on_ended(request_id, read, ended))
        self.driver.read(read)

    def _on_ended(self, request_id: RequestId, read: Read, ended: "asyncio.Future[None]") -> None:
        self._reads[request_id].discard(ended)
        if not self._reads[request_id]:
            del self._reads[request_id]
        if not isinstance(ended.exception(), Unwanted | None):
            read.peer.is_broken = True
        self.peers.release(read.peer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unproven = sum(not inflow.is_proven for inflow in self._inflows)
        if not self._is_up or len(self._inflows) >= CONNECTIONS_MAX or unproven >= UNPROVEN_MAX:
            self.place.metrics.failed(TRANSPORT, "in")
            writer.transport.abort()
            return
        inflow = Inflow(self, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._inflows[inflow] = task
        try:
            await inflow.run()
        finally:
            await inflow.closed()
            del self._inflows[inflow]
