"""The receiving end of a socket: carries bytes to where its inlet wants them, many places by one system call."""

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from kvtransfer.tcp.inlet import Inlet

TURN_BYTES = 1024 * 1024
"""Received between two turns of the loop, and what one system call brings beyond: a fraction of a millisecond."""
MakeInlet = Callable[[Callable[[bytes], None]], Inlet]
"""From how the inlet answers."""


class Inflow(Protocol):
    """One connection on the decode side."""

    ended: asyncio.Event
    """Set when nothing lands by it any more."""

    @property
    def is_authenticated(self) -> bool: ...

    @property
    def has_failed(self) -> bool: ...

    @property
    def is_overdue(self) -> bool: ...

    def cut(self) -> None:
        """Ends it, soon."""


class SocketInflow:
    """Owns the socket, which is non-blocking. Buffers are taken, filled and reported back within one callback of the
    loop: so nothing lands once a ticket is closed."""

    def __init__(self, sock: socket.socket, make_inlet: MakeInlet, on_lost: "Callable[[SocketInflow], None]") -> None:
        self._socket, self._on_lost = sock, on_lost
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self.ended = asyncio.Event()
        # Buffer sizes are the kernel's: setting them would end its tuning, which may go further than we may.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(sock, self._on_readable)
        self._inlet = make_inlet(self._answer)

    @property
    def is_authenticated(self) -> bool:
        return self._inlet.is_authenticated

    @property
    def has_failed(self) -> bool:
        return self._inlet.has_failed

    @property
    def is_overdue(self) -> bool:
        return self._inlet.is_overdue()

    def cut(self) -> None:
        if self.ended.is_set():
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._inlet.close()
        self.ended.set()
        self._on_lost(self)

    def _on_readable(self) -> None:
        taken = 0
        while taken < TURN_BYTES and not self._unsent:
            try:
                size, _, _, _ = self._socket.recvmsg_into(self._inlet.buffers())
            except BlockingIOError:
                return
            except OSError:  # the sender reports it; here it is one connection less
                size = 0
            if size == 0:
                self.cut()
                return
            self._inlet.filled(size)
            taken += size

    def _answer(self, data: bytes) -> None:
        self._unsent += data
        self._send()

    def _send(self) -> None:
        """If the peer does not read its answers, nothing more is taken from it until it does."""
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # reading ends it
        if self._unsent:
            self._loop.remove_reader(self._socket)
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        self._send()
        if not self._unsent:
            self._loop.remove_writer(self._socket)
            self._loop.add_reader(self._socket, self._on_readable)
