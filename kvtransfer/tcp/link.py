"""The sending end of one connection: sends views as they are, and listens for answers."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from baton.errors import TransferError
from kvtransfer.tcp.wire import Fault, Header, Kind

SEND_VIEWS_MAX = 64
SEND_BYTES = 1024 * 1024
"""Sent between two turns of the loop: a fraction of a millisecond."""
LOST = "The receiver closed the connection."
_STALLED = "The receiver took nothing for {:g} s."


class Link:
    """Carries one ticket at a time. After any error it is only good for `close`.

    Raises TransferError when the peer is gone, refuses, or takes nothing for `stall_timeout_s`.
    """

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        self._sock, self._stall_timeout_s = sock, stall_timeout_s
        self._loop = asyncio.get_running_loop()
        self._unread = bytearray()
        self._sequence = 0
        self._answer: asyncio.Future[None] | None = None
        self.failure: str | None = None
        """Why it cannot be used any more; a sentence."""
        self._loop.add_reader(sock, self._on_readable)

    @classmethod
    async def dial(cls, host: str, port: int, stall_timeout_s: float) -> "Link":
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
                return cls(sock, stall_timeout_s)
            except OSError as failed:
                sock.close()
                error = failed
            except BaseException:
                sock.close()
                raise
        assert error is not None
        raise TransferError(f"The receiver at {host}:{port} could not be reached: {_reason(error)}.") from None

    async def send(self, views: Sequence[memoryview | bytes]) -> None:
        """Returns when the views may change again."""
        for batch in _batches(views):
            self.check()
            await self._send_batch(batch)
            await asyncio.sleep(0)  # the loop's turn: a socket that takes all at once would never yield

    async def _send_batch(self, batch: Sequence[memoryview]) -> None:
        try:
            sent = self._sock.sendmsg(batch)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise self._failed(LOST) from None
        for view in batch:
            if sent < len(view):
                await self._send_rest(view[sent:])
            sent = max(0, sent - len(view))

    async def _send_rest(self, view: memoryview) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._loop.sock_sendall(self._sock, view)
        except TimeoutError:
            raise self._failed(_STALLED.format(self._stall_timeout_s)) from None
        except OSError:
            raise self._failed(LOST) from None

    async def ask(self, kind: Kind, ticket: int, body: bytes = b"") -> None:
        """Sends a frame that the receiver acknowledges, and waits for that."""
        self._sequence = (self._sequence + 1) % 2**32
        answer = self._answer = self._loop.create_future()
        try:
            await self.send([Header(kind, ticket, count=self._sequence).pack() + body])
            async with asyncio.timeout(self._stall_timeout_s):
                await answer
        except TimeoutError:
            raise self._failed(_STALLED.format(self._stall_timeout_s)) from None
        finally:
            self._answer = None
            if answer.done() and not answer.cancelled():
                answer.exception()  # where the sending failed first, nobody awaits it

    def check(self) -> None:
        if self.failure is not None:
            raise TransferError(self.failure)

    def interrupt(self) -> None:
        """Makes whatever waits on this link end with an error."""
        self._fail("The connection was interrupted.")

    def close(self, *, clean: bool) -> None:
        """Idempotent; nothing may wait on it. Unclean: what the kernel has not sent yet is not sent."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if not clean:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()
        self.failure = self.failure or "The connection is closed."

    def _failed(self, sentence: str) -> TransferError:
        """An answer that came before, such as why the receiver closed, says more than the broken pipe."""
        self._on_readable()
        self._fail(sentence)
        assert self.failure is not None
        return TransferError(self.failure)

    def _fail(self, sentence: str) -> None:
        if self.failure is not None:
            return
        self.failure = sentence
        self._loop.remove_reader(self._sock)
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a send that waits
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TransferError(sentence))

    def _on_readable(self) -> None:
        if self.failure is not None:
            return
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._unread += data
        while len(self._unread) >= Header.FORMAT.size:
            header = Header.unpack(self._unread[: Header.FORMAT.size])
            del self._unread[: Header.FORMAT.size]
            self._on_answer(header)
        if not data:
            self._fail(LOST)

    def _on_answer(self, header: Header | None) -> None:
        if header is not None and header.kind == Kind.ERROR and header.count in tuple(Fault):
            self._fail(Fault(header.count).sentence)
        elif header is None or header.kind != Kind.ACK or header.count != self._sequence or self._answer is None:
            self._fail("The receiver sent an answer that nobody asked for.")
        elif not self._answer.done():
            self._answer.set_result(None)


def _batches(views: Sequence[memoryview | bytes]) -> list[list[memoryview]]:
    """Groups for one system call each; a view longer than SEND_BYTES is cut."""
    batches: list[list[memoryview]] = []
    room = 0
    for whole in views:
        view = memoryview(whole)
        while view:
            if room == 0 or len(batches[-1]) == SEND_VIEWS_MAX:
                batches.append([])
                room = SEND_BYTES
            batches[-1].append(view[:room])
            view, room = view[room:], room - len(view[:room])
    return batches


def _reason(error: OSError) -> str:
    """The system's own words: event loops put others of their own in `strerror`."""
    return os.strerror(error.errno) if error.errno else str(error)
