"""The receiving end of a TLS connection: carries bytes out of TLS to where its inlet wants them."""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from baton.errors import TransferError
from kvtransfer.tcp.inflow import MakeInlet
from kvtransfer.tcp.inlet import Inlet
from kvtransfer.tls import TlsContexts


class TlsInflow(asyncio.BufferedProtocol):
    """Implements kvtransfer.tcp.inflow.Inflow, from before the handshake, for `handshake_s` at most. A buffer is taken,
    filled and reported back within one callback of the loop: so nothing lands once a ticket is closed."""

    def __init__(
        self,
        sock: socket.socket,
        tls: TlsContexts,
        make_inlet: MakeInlet,
        on_lost: "Callable[[TlsInflow], None]",
        handshake_s: float,
    ) -> None:
        """Owns the socket, which is non-blocking."""
        self._make_inlet, self._on_lost = make_inlet, on_lost
        self._transport: asyncio.Transport | None = None
        self._inlet: Inlet | None = None
        self.ended = asyncio.Event()
        self._handshake = asyncio.get_running_loop().create_task(self._shake_hands(sock, tls, handshake_s))
        self._handshake.add_done_callback(lambda _: self._on_shaken(sock))

    @property
    def is_authenticated(self) -> bool:
        return self._inlet is not None and self._inlet.is_authenticated

    @property
    def has_failed(self) -> bool:
        return self._inlet is None or self._inlet.has_failed

    @property
    def is_overdue(self) -> bool:
        return self._inlet is not None and self._inlet.is_overdue()

    def cut(self) -> None:
        if self._transport is None:
            self._handshake.cancel()
        else:
            self._transport.abort()

    async def _shake_hands(self, sock: socket.socket, tls: TlsContexts, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: self, sock, ssl=tls.current(), ssl_handshake_timeout=timeout_s)

    def _on_shaken(self, sock: socket.socket) -> None:
        error = None if self._handshake.cancelled() else self._handshake.exception()
        if self._handshake.cancelled() or error is not None:
            sock.close()
            self._end()
        if error is not None and not isinstance(error, OSError | TransferError):
            raise error  # what may be: it is gone, does no TLS, shows no good certificate, or our own files are bad

    def _end(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            self._on_lost(self)

    # ---- for the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not of that class
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._inlet = self._make_inlet(self._transport.write)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        assert self._inlet is not None
        return self._inlet.buffers()[0]

    def buffer_updated(self, nbytes: int) -> None:
        assert self._inlet is not None
        self._inlet.filled(nbytes)

    def pause_writing(self) -> None:
        """The peer does not read its answers: nothing more is taken from it until it does."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        del error  # the sender reports it; here it is one connection less
        if self._inlet is not None:
            self._inlet.close()
        self._end()
