"""The decode side: listens, and lets each connection fill the region under the ticket that it proved."""

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence

from baton.clock import monotonic
from baton.ids import BlockId, RequestId
from kvtransfer.control import Address
from kvtransfer.interface import Offer
from kvtransfer.port import Place
from kvtransfer.tcp.inflow import Inflow, SocketInflow
from kvtransfer.tcp.inlet import Inlet
from kvtransfer.tcp.listener import Listener
from kvtransfer.tcp.patience import PATIENCE, Patience
from kvtransfer.tcp.proof import NONCE_BYTES
from kvtransfer.tcp.tls_inflow import TlsInflow
from kvtransfer.tcp.wire import TRANSPORT
from kvtransfer.tickets import TicketBook
from kvtransfer.tls import TlsContexts

CONNECTIONS_MAX = 4096
"""Past it a new connection is closed at once."""
UNAUTHENTICATED_MAX = 256
"""Of these; past it the oldest is cut: who holds a ticket proves it at once, so strangers do not keep others out."""
SCRATCH_BYTES = 256 * 1024
"""Where bytes go that must not land; all connections write there and nobody reads."""


class TcpReceiver:
    """Listens at `place.host`; port 0 picks a free one. `place.advertise_host` is what peers connect to."""

    def __init__(self, place: Place, patience: Patience = PATIENCE) -> None:
        self._place, self._patience = place, patience
        self._tls = None if place.tls is None else TlsContexts(place.tls, is_server=True)
        self._tickets = TicketBook()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._inflows: dict[Inflow, None] = {}
        """Oldest first."""
        self._listener: Listener | None = None
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def port(self) -> int:
        assert self._listener is not None, "start() comes first"
        return self._listener.port

    async def start(self) -> None:
        if self._tls is not None:
            self._tls.current()  # a file that cannot be used stops the start
        self._listener = await Listener.bind(self._place.host, self._place.port, self._on_socket)
        self._sweep_later()

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        ticket = self._tickets.open(request_id, blocks)
        is_tls = self._tls is not None
        address = Address(self._place.advertise_host, self.port, ticket.number, ticket.secret, is_tls)
        return (Offer(TRANSPORT, address.pack()),)

    def close_ticket(self, request_id: RequestId) -> None:
        self._tickets.close(request_id)

    async def settle(self, request_id: RequestId) -> None:
        """At once: nothing lands without this process, which asks the ticket before each copy."""

    async def close(self) -> None:
        self._tickets.close_all()
        if self._listener is None:
            return
        self._listener.close()
        if self._sweep is not None:
            self._sweep.cancel()
        inflows = tuple(self._inflows)
        for inflow in inflows:
            inflow.cut()
        for inflow in inflows:
            await inflow.ended.wait()

    # ---- its connections

    def _on_socket(self, sock: socket.socket) -> None:
        if len(self._inflows) >= CONNECTIONS_MAX:
            self._place.metrics.failed(TRANSPORT, "in")
            sock.close()
            return
        unauthenticated = [inflow for inflow in self._inflows if not inflow.is_authenticated]
        if len(unauthenticated) >= UNAUTHENTICATED_MAX:
            unauthenticated[0].cut()
        if self._tls is None:
            self._inflows[SocketInflow(sock, self._make_inlet, self._forget)] = None
        else:
            self._inflows[TlsInflow(sock, self._tls, self._make_inlet, self._forget, self._patience.hello_s)] = None

    def _forget(self, inflow: Inflow) -> None:
        if inflow.has_failed:
            self._place.metrics.failed(TRANSPORT, "in")
        self._inflows.pop(inflow, None)

    def _make_inlet(self, answer: Callable[[bytes], None]) -> Inlet:
        return Inlet(
            self._place.region,
            self._tickets,
            self._scratch,
            answer,
            self._place.metrics,
            monotonic,
            self._patience,
            secrets.token_bytes(NONCE_BYTES),
            self._place.secret,
        )

    def _sweep_later(self) -> None:
        patience = self._patience
        interval_s = min(patience.hello_s, patience.stall_s, patience.idle_s, patience.linger_s) / 2
        self._sweep = asyncio.get_running_loop().call_later(interval_s, self._cut_the_overdue)

    def _cut_the_overdue(self) -> None:
        for inflow in tuple(self._inflows):
            if inflow.is_overdue:
                inflow.cut()
        self._sweep_later()
