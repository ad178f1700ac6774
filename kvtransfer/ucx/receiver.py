"""The decode side: listens for control connections, and lets each fill the region under the ticket that it proved."""

import asyncio
import socket
from collections.abc import Sequence

from baton.clock import monotonic
from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from kvtransfer.control import Address, Fault
from kvtransfer.interface import Offer
from kvtransfer.port import Place
from kvtransfer.tickets import Ticket, TicketBook
from kvtransfer.ucx.channel import Channel
from kvtransfer.ucx.context import Context
from kvtransfer.ucx.inlet import PATIENCE, Inlet, Patience
from kvtransfer.ucx.lane import Lane
from kvtransfer.ucx.wire import TRANSPORT, Frame

LINKS_MAX = 1024
UNAUTHENTICATED_MAX = 256
"""Of these; past either bound a new connection is closed at once."""
BACKLOG = 1024


class UcxReceiver:
    """Listens at `place.host`; port 0 picks a free one. `place.advertise_host` is what peers connect to."""

    def __init__(self, place: Place, context: Context, patience: Patience = PATIENCE) -> None:
        self.place, self.context, self._patience = place, context, patience
        self.tickets = TicketBook()
        self.inflows: set[_Inflow] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def port(self) -> int:
        assert self._server is not None, "start() comes first"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        host = self.place.host
        self.context.make_worker()  # that it can be made is known before anybody is invited
        try:
            found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]  # one socket: with port 0 each would get a port of its own
            listening = socket.create_server(address, family=family, backlog=BACKLOG)
            self._server = await loop.create_server(lambda: Channel(_Inflow(self)), sock=listening, backlog=BACKLOG)
        except OSError as error:
            raise TransferError(f"KV blocks cannot come in at {host} by UCX: {error.strerror}.") from None
        self._sweep_later()

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        self.close_ticket(request_id)
        ticket = self.tickets.open(request_id, blocks)
        address = Address(self.place.advertise_host, self.port, ticket.number, ticket.secret)
        return (Offer(TRANSPORT, address.pack()),)

    def close_ticket(self, request_id: RequestId) -> None:
        if ticket := self.tickets.close(request_id):
            self._withdraw(ticket)

    def _withdraw(self, ticket: Ticket) -> None:
        for inflow in tuple(self.inflows):
            if inflow.inlet.ticket is ticket and inflow.inlet.is_landing:
                inflow.refuse(Fault.TICKET_CLOSED)

    async def settle(self, request_id: RequestId) -> None:
        """At once: closing the ticket closed the UCX workers by which something was landing under it."""

    async def close(self) -> None:
        self.tickets.close_all()
        if self._server is None:
            return
        if self._sweep is not None:
            self._sweep.cancel()
        self._server.close()
        inflows = tuple(self.inflows)
        for inflow in inflows:
            inflow.cut()
        for inflow in inflows:
            await inflow.ended.wait()
        await self._server.wait_closed()
        self._server = None

    # ---- for its connections

    def has_room(self) -> bool:
        """Whether one more connection may come in."""
        unauthenticated = sum(inflow.inlet.ticket is None for inflow in self.inflows)
        if len(self.inflows) >= LINKS_MAX or unauthenticated >= UNAUTHENTICATED_MAX:
            self.place.metrics.failed(TRANSPORT, "in")
            return False
        return True

    def _sweep_later(self) -> None:
        patience = self._patience
        interval_s = min(patience.hello_s, patience.stall_s, patience.idle_s, patience.linger_s) / 2
        self._sweep = asyncio.get_running_loop().call_later(interval_s, self._cut_the_overdue)

    def _cut_the_overdue(self) -> None:
        for inflow in tuple(self.inflows):
            if inflow.inlet.is_overdue(self._patience):
                inflow.cut()
        self._sweep_later()


class _Inflow:
    """One link, as its receiver sees it: a control connection, and a lane once a ticket is proven."""

    inlet: Inlet

    def __init__(self, receiver: UcxReceiver) -> None:
        self._receiver = receiver
        self._channel: Channel | None = None
        self._lane: Lane | None = None
        self.ended = asyncio.Event()

    def on_connected(self, channel: Channel) -> None:
        self._channel = channel
        if not self._receiver.has_room():
            channel.abort()
            return
        place, tickets = self._receiver.place, self._receiver.tickets
        ways = self._open_lane, channel.send, self._on_change
        self.inlet = Inlet(place.region, tickets, place.secret, *ways, place.metrics, monotonic)
        self._receiver.inflows.add(self)

    def on_frame(self, frame: Frame) -> None:
        self.inlet.take(frame)

    def on_lost(self) -> None:
        self._receiver.inflows.discard(self)
        self._close_lane()
        self.ended.set()

    def refuse(self, fault: Fault) -> None:
        """When it returns nothing lands by this link any more."""
        self._close_lane()
        self.inlet.refuse(fault)

    def cut(self) -> None:
        self._close_lane()
        if self._channel is not None:
            self._channel.abort()

    def _on_change(self) -> None:
        assert self._channel is not None
        if self.inlet.refusal is not None:
            self._close_lane()
            self._channel.close()
        elif self.inlet.is_full:
            self._channel.pause()
        else:
            self._channel.resume()

    def _open_lane(self, address: bytes) -> Lane:
        self._lane = Lane(self._receiver.context)
        self._lane.connect(address)
        return self._lane

    def _close_lane(self) -> None:
        if self._lane is not None:
            self._lane.close()
