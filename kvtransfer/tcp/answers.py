"""What the receiver says on one connection, as a machine without I/O: bytes in, futures done."""

import asyncio
from collections.abc import Callable

from baton.errors import TransferError
from kvtransfer.control import Fault
from kvtransfer.tcp.proof import NONCE_BYTES, PROOF_BYTES
from kvtransfer.tcp.wire import Header, Kind

LOST = "The receiver closed the connection."
_UNASKED = "The receiver sent an answer that nobody asked for."
_BODY_BYTES = {Kind.CHALLENGE: NONCE_BYTES, Kind.WELCOME: PROOF_BYTES, Kind.ACK: 0, Kind.ERROR: 0}


class Answers:
    """Expects one answer at a time, the challenge first. The first failure is final and fails what is awaited."""

    def __init__(self) -> None:
        self.failure: str | None = None
        """Why nothing may be asked any more; a sentence."""
        self._unread = bytearray()
        self._awaited: tuple[Kind, int, asyncio.Future[bytes]] | None = None
        self._on_failure: Callable[[], None] | None = None
        self.challenge = self.expect(Kind.CHALLENGE, 0)

    def expect(self, kind: Kind, count: int) -> asyncio.Future[bytes]:
        """The body of the next answer, which must be of that kind and count. Raises TransferError after a failure."""
        self.check()
        assert self._awaited is None, "a link is used by one task at a time"
        body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        body.add_done_callback(_retrieved)
        self._awaited = kind, count, body
        return body

    def check(self) -> None:
        if self.failure is not None:
            raise TransferError(self.failure)

    def when_failed(self, on_failure: Callable[[], None]) -> None:
        """Called once, at once if it has failed."""
        self._on_failure = on_failure
        if self.failure is not None:
            on_failure()

    def heard(self, data: bytes | bytearray | memoryview) -> None:
        if self.failure is None:
            self._unread += data
        while self.failure is None and (answer := self._next_frame()) is not None:
            self._on_answer(*answer)

    def lost(self) -> None:
        self.fail(LOST)

    def fail(self, sentence: str) -> None:
        if self.failure is not None:
            return
        self.failure = sentence
        self._unread.clear()
        if self._awaited is not None and not self._awaited[2].done():
            self._awaited[2].set_exception(TransferError(sentence))
        if self._on_failure is not None:
            self._on_failure()

    def _next_frame(self) -> tuple[Header, bytes] | None:
        """None until all of it is there. Holds one frame at most: a kind that is no answer has no body."""
        head_bytes = Header.FORMAT.size
        if len(self._unread) < head_bytes:
            return None
        header = Header.unpack(self._unread[:head_bytes])
        if header is None or header.kind not in _BODY_BYTES:
            self.fail(_UNASKED)
            return None
        end = head_bytes + _BODY_BYTES[Kind(header.kind)]
        if len(self._unread) < end:
            return None
        body = bytes(self._unread[head_bytes:end])
        del self._unread[:end]
        return header, body

    def _on_answer(self, header: Header, body: bytes) -> None:
        if header.kind == Kind.ERROR and header.count in tuple(Fault):
            self.fail(Fault(header.count).sentence)
        elif self._awaited is None or (header.kind, header.count) != self._awaited[:2]:
            self.fail(_UNASKED)
        else:
            awaited = self._awaited[2]
            self._awaited = None
            if not awaited.done():
                awaited.set_result(body)


def _retrieved(body: asyncio.Future[bytes]) -> None:
    """Where something else ended first, nobody awaits it."""
    if not body.cancelled():
        body.exception()
