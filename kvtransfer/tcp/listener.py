"""Takes connections in: as many as there is room for, and none that cannot be counted, TLS handshakes included."""

import asyncio
import socket
from collections.abc import Callable

from baton.errors import TransferError

BACKLOG = 1024
ACCEPTED_MAX = 64
"""Taken in one turn of the loop."""
PAUSE_S = 0.5
"""After the system refused a descriptor or memory: until it is asked again."""


class Listener:
    """Gives each accepted socket, non-blocking, to `on_socket`, which owns it."""

    def __init__(self, listening: socket.socket, on_socket: Callable[[socket.socket], None]) -> None:
        self._socket, self._on_socket = listening, on_socket
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._resume()

    @classmethod
    async def bind(cls, host: str, port: int, on_socket: Callable[[socket.socket], None]) -> "Listener":
        """One address alone: with port 0 each would get a port of its own. Raises TransferError if it cannot be."""
        try:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            listening = socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:
            raise TransferError(f"KV blocks cannot come in at {host}:{port}: {error.strerror}.") from None
        listening.setblocking(False)
        return cls(listening, on_socket)

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_MAX):
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # descriptors or memory are short: who waits in the backlog is taken later
                self._loop.remove_reader(self._socket)
                self._pause = self._loop.call_later(PAUSE_S, self._resume)
                return
            accepted.setblocking(False)
            self._on_socket(accepted)
