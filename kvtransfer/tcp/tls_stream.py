"""The sending end of a TLS connection: views are encrypted piece by piece, as fast as the socket takes them."""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Self, cast

from baton.errors import TransferError
from kvtransfer.tcp.stream import Listener, forget_unsent

PIECE_BYTES = 256 * 1024
"""Encrypted in one go; so much, and as much again that the transport accepts, is held beside the socket's buffer."""


class TlsStream(asyncio.Protocol):
    """Implements kvtransfer.tcp.stream.Stream. Encrypting copies, so views may change when a write returns."""

    def __init__(self, listener: Listener, stall_timeout_s: float) -> None:
        self._listener, self._stall_timeout_s = listener, stall_timeout_s
        self._may_write, self._ended = asyncio.Event(), asyncio.Event()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, sock: socket.socket, context: ssl.SSLContext, listener: Listener, stall_timeout_s: float
    ) -> Self:
        """Owns the socket from now on. Raises TransferError if the receiver cannot do TLS or is not to be trusted."""
        stream = cls(listener, stall_timeout_s)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: stream, sock=sock, ssl=context, server_hostname="", ssl_handshake_timeout=stall_timeout_s
            )
        except OSError as error:  # ssl.SSLError is one
            sock.close()
            raise TransferError(f"No TLS connection to the receiver: {_reason(error)}.") from None
        except BaseException:
            sock.close()
            raise
        return stream

    # ---- for the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not of that class
        self._transport.set_write_buffer_limits(high=PIECE_BYTES)
        self._may_write.set()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        self._listener.heard(data)

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._ended.set()
        self._may_write.set()
        self._listener.lost()

    # ---- for the link

    async def send(self, views: Sequence[memoryview | bytes]) -> None:
        assert self._transport is not None
        for whole in views:
            view = memoryview(whole)
            for start in range(0, len(view), PIECE_BYTES):
                async with asyncio.timeout(self._stall_timeout_s):
                    await self._may_write.wait()
                if self._ended.is_set() or self._transport.is_closing():
                    raise ConnectionResetError
                self._transport.write(view[start : start + PIECE_BYTES])
                await asyncio.sleep(0)  # the loop's turn

    def listen(self) -> None:
        """The loop tells by itself."""

    def shut(self) -> None:
        self.close(clean=False)
        self._may_write.set()  # wakes a send that waits

    def close(self, *, clean: bool) -> None:
        """A clean one has nothing unsent either: its last frame was answered. Nobody waits for the peer's TLS end."""
        assert self._transport is not None
        if self._transport.is_closing():
            return
        if not clean:
            forget_unsent(self._transport.get_extra_info("socket"))
        self._transport.abort()


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not good ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error) or "it closed the connection"
