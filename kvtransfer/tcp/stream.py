"""The sending end of a socket: views go out as they are, answers come in."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Protocol

from baton.errors import TransferError

SEND_VIEWS_MAX = 64
SEND_BYTES = 1024 * 1024
"""Sent between two turns of the loop: a fraction of a millisecond."""


class Listener(Protocol):
    def heard(self, data: bytes) -> None: ...

    def lost(self) -> None: ...


class Stream(Protocol):
    """One connection's bytes. `send` is used by one task at a time."""

    async def send(self, views: Sequence[memoryview | bytes]) -> None:
        """Returns when the views may change again; no more than the system's buffer, or a piece, waits by then. Raises
        TimeoutError if the peer takes nothing for too long, another OSError if the connection is lost."""

    def shut(self) -> None:
        """Makes a send that waits, and each that follows, fail."""

    def listen(self) -> None:
        """Hears what has come already."""

    def close(self, *, clean: bool) -> None:
        """Idempotent; nothing may wait in `send`. Unclean: what was not sent yet is not sent."""


class SocketStream:
    """Owns the socket, which is connected and non-blocking."""

    def __init__(self, sock: socket.socket, listener: Listener, stall_timeout_s: float) -> None:
        self._sock, self._listener, self._stall_timeout_s = sock, listener, stall_timeout_s
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self.listen)

    async def send(self, views: Sequence[memoryview | bytes]) -> None:
        for batch in batches(views):
            await self._send_batch(batch)
            await asyncio.sleep(0)  # the loop's turn: a socket that takes all at once would never yield

    async def _send_batch(self, batch: list[memoryview]) -> None:
        while True:
            try:
                sent = self._sock.sendmsg(batch)
            except BlockingIOError:
                sent = 0
            batch = rest_of(batch, sent)
            if not batch:
                return
            async with asyncio.timeout(self._stall_timeout_s):
                await self._writable()

    async def _writable(self) -> None:
        """Returns when the socket takes more, or has failed; `shut` wakes it too."""
        writable = asyncio.Event()
        self._loop.add_writer(self._sock, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(self._sock)

    def listen(self) -> None:
        if self._sock.fileno() < 0:
            return
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._listener.heard(data)
        else:
            self._loop.remove_reader(self._sock)
            self._listener.lost()

    def shut(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            with contextlib.suppress(OSError):  # the peer was faster
                self._sock.shutdown(socket.SHUT_RDWR)

    def close(self, *, clean: bool) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if not clean:
            forget_unsent(self._sock)
        self._sock.close()


async def connect_socket(host: str, port: int) -> socket.socket:
    """To the first address that answers. Raises TransferError if none does."""
    loop = asyncio.get_running_loop()
    error: OSError | None = None
    try:
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        raise TransferError("The receiver's host name could not be resolved.") from None
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
            return sock
        except OSError as failed:
            sock.close()
            error = failed
        except BaseException:
            sock.close()
            raise
    assert error is not None
    raise TransferError(f"The receiver at {host}:{port} could not be reached: {_reason(error)}.") from None


def forget_unsent(sock: socket.socket) -> None:
    """Closing it resets the connection instead of sending on."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def batches(views: Sequence[memoryview | bytes]) -> Iterator[list[memoryview]]:
    """Groups for one system call each; a view longer than SEND_BYTES is cut."""
    batch: list[memoryview] = []
    room = SEND_BYTES
    for whole in views:
        view = memoryview(whole)
        while view:
            piece, view = view[:room], view[room:]
            batch.append(piece)
            room -= len(piece)
            if room == 0 or len(batch) == SEND_VIEWS_MAX:
                yield batch
                batch, room = [], SEND_BYTES
    if batch:
        yield batch


def rest_of(batch: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of a batch after its first `sent` bytes."""
    for i, view in enumerate(batch):
        if sent < len(view):
            return [view[sent:], *batch[i + 1 :]]
        sent -= len(view)
    return []


def _reason(error: OSError) -> str:
    """The system's own words: event loops put others of their own in `strerror`."""
    return os.strerror(error.errno) if error.errno else str(error)
