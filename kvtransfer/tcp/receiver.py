"""The decode side: listens, and lets each connection fill the region under the ticket that it proved."""

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence

from baton.clock import monotonic
from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from kvtransfer.interface import Offer
from kvtransfer.port import Place
from kvtransfer.tcp.inflow import Inflow, SocketInflow
from kvtransfer.tcp.inlet import PATIENCE, Inlet, Patience
from kvtransfer.tcp.listener import Listener
from kvtransfer.tcp.proof import NONCE_BYTES
from kvtransfer.tcp.tls_inflow import TlsInflow
from kvtransfer.tcp.wire import TRANSPORT, Address
from kvtransfer.tickets import TicketBook
from kvtransfer.tls import TlsContexts

CONNECTIONS_MAX = 4096
UNAUTHENTICATED_MAX = 256
"""Of these; past either bound a new connection is closed at once."""
SCRATCH_BYTES = 256 * 1024
"""Where bytes go that must not land; all connections write there and nobody reads."""


class TcpReceiver:
    """Listens at `place.host`; port 0 picks a free one. `place.advertise_host` is what peers connect to."""

    def __init__(self, place: Place, patience: Patience = PATIENCE) -> None:
        self._place, self._patience = place, patience
        self._tls = None if place.tls is None else TlsContexts(place.tls, is_server=True)
        self._tickets = TicketBook()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._inflows: set[Inflow] = set()
        self._handshakes: set[asyncio.Task[None]] = set()
        """Of those inflows whose TLS is not up yet."""
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
        for handshake in self._handshakes:
            handshake.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        inflows = tuple(self._inflows)
        for inflow in inflows:
            inflow.cut()
        for inflow in inflows:
            await inflow.ended.wait()

    # ---- its connections

    def _on_socket(self, sock: socket.socket) -> None:
        unauthenticated = sum(not inflow.is_authenticated for inflow in self._inflows)
        if len(self._inflows) >= CONNECTIONS_MAX or unauthenticated >= UNAUTHENTICATED_MAX:
            self._place.metrics.failed(TRANSPORT, "in")
            sock.close()
            return
        if self._tls is None:
            self._inflows.add(SocketInflow(sock, self._make_inlet, self._inflows.discard))
        else:
            self._begin_tls(sock, self._tls)

    def _begin_tls(self, sock: socket.socket, tls: TlsContexts) -> None:
        inflow = TlsInflow(self._make_inlet, self._inflows.discard)
        self._inflows.add(inflow)
        handshake = asyncio.get_running_loop().create_task(self._shake_hands(inflow, sock, tls))
        self._handshakes.add(handshake)
        handshake.add_done_callback(lambda _: self._on_shaken(handshake, inflow, sock))

    async def _shake_hands(self, inflow: TlsInflow, sock: socket.socket, tls: TlsContexts) -> None:
        loop, timeout_s = asyncio.get_running_loop(), self._patience.hello_s
        await loop.connect_accepted_socket(lambda: inflow, sock, ssl=tls.current(), ssl_handshake_timeout=timeout_s)

    def _on_shaken(self, handshake: asyncio.Task[None], inflow: TlsInflow, sock: socket.socket) -> None:
        self._handshakes.discard(handshake)
        error = None if handshake.cancelled() else handshake.exception()
        if handshake.cancelled() or error is not None:
            self._inflows.discard(inflow)
            sock.close()
            self._place.metrics.failed(TRANSPORT, "in")
        if error is not None and not isinstance(error, OSError | TransferError):
            raise error  # what may be: it is gone, does no TLS, shows no good certificate, or ours are bad by now

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
