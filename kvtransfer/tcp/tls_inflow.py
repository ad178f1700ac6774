"""The receiving end of a TLS connection: carries bytes out of TLS to where its inlet wants them."""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from kvtransfer.tcp.inflow import MakeInlet
from kvtransfer.tcp.inlet import Inlet


class TlsInflow(asyncio.BufferedProtocol):
    """Implements kvtransfer.tcp.inflow.Inflow. A buffer is taken, filled and reported back within one callback of the
    loop: so nothing lands once a ticket is closed."""

    def __init__(self, make_inlet: MakeInlet, on_lost: "Callable[[TlsInflow], None]") -> None:
        self._make_inlet, self._on_lost = make_inlet, on_lost
        self._inlet: Inlet | None = None
        """None during the handshake."""
        self.ended = asyncio.Event()

    @property
    def is_authenticated(self) -> bool:
        return self._inlet is not None and self._inlet.is_authenticated

    @property
    def is_overdue(self) -> bool:
        return self._inlet is not None and self._inlet.is_overdue()

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
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        del error  # the sender reports it; here it is one connection less
        if self._inlet is not None:
            self._inlet.close()
        self._on_lost(self)
        self.ended.set()

    def cut(self) -> None:
        self._transport.abort()
