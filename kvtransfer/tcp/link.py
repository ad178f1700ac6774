"""The sending side of one connection: frames out, answers in."""

import asyncio
import secrets
import ssl
from collections.abc import Sequence

from baton.errors import TransferError
from kvtransfer.tcp.answers import LOST, Answers
from kvtransfer.tcp.proof import NONCE_BYTES, Greeting, Role
from kvtransfer.tcp.stream import SocketStream, Stream, connect_socket
from kvtransfer.tcp.tls_stream import TlsStream
from kvtransfer.tcp.wire import Header, Hello, Kind

COUNT_MAX = 2**31
_STALLED = "The receiver took nothing for {:g} s."


class Link:
    """Carries one ticket at a time. After any error it is only good for `close`.

    Raises TransferError when the peer is gone, refuses, or takes nothing for `stall_timeout_s`.
    """

    def __init__(self, stream: Stream, answers: Answers, stall_timeout_s: float) -> None:
        self._stream, self._answers, self._stall_timeout_s = stream, answers, stall_timeout_s
        self._count = 0
        self._challenge: bytes | None = None
        answers.when_failed(stream.shut)

    @classmethod
    async def dial(cls, host: str, port: int, stall_timeout_s: float, tls: ssl.SSLContext | None) -> "Link":
        answers = Answers()
        sock = await connect_socket(host, port)
        if tls is None:
            return cls(SocketStream(sock, answers, stall_timeout_s), answers, stall_timeout_s)
        return cls(await TlsStream.open(sock, tls, answers, stall_timeout_s), answers, stall_timeout_s)

    @property
    def failure(self) -> str | None:
        """Why it cannot be used any more; a sentence."""
        return self._answers.failure

    @property
    def is_reusable(self) -> bool:
        """For another ticket: its frames' count must not come to an end on the way."""
        return self.failure is None and self._count < COUNT_MAX

    async def greet(self, ticket: int, key: bytes, layout_digest: bytes) -> None:
        """Proves the ticket to the receiver, and has it prove itself."""
        if self._challenge is None:
            self._challenge = await self._answered(self._answers.challenge)
        nonce = secrets.token_bytes(NONCE_BYTES)
        greeting = Greeting(self._challenge, nonce, self._count + 1, ticket, layout_digest)
        hello = Hello(nonce, layout_digest, greeting.proof(Role.SENDER, key))
        proof = await self._ask(Kind.HELLO, ticket, Kind.WELCOME, hello.pack())
        if not greeting.is_proven(proof, Role.RECEIVER, key):
            raise self._failed("The receiver did not prove that it belongs to the cluster and made the ticket.")

    async def send(self, views: Sequence[memoryview | bytes]) -> None:
        """Returns when the views may change again."""
        self._answers.check()
        try:
            await self._stream.send(views)
        except TimeoutError:
            raise self._failed(_STALLED.format(self._stall_timeout_s)) from None
        except OSError:
            raise self._failed(LOST) from None

    async def fence(self, ticket: int) -> None:
        """Returns when the receiver says that all sent for the ticket has landed."""
        await self._ask(Kind.FENCE, ticket, Kind.ACK)

    def interrupt(self) -> None:
        """Makes whatever waits on this link end with an error."""
        self._answers.fail("The connection was interrupted.")

    def close(self, *, clean: bool) -> None:
        """Idempotent; nothing may wait on it. Unclean: what the kernel has not sent yet is not sent."""
        self._stream.close(clean=clean)
        self._answers.fail("The connection is closed.")

    async def _ask(self, kind: Kind, ticket: int, answer: Kind, body: bytes = b"") -> bytes:
        self._count += 1
        answered = self._answers.expect(answer, self._count)
        await self.send([Header(kind, ticket, count=self._count).pack() + body])
        return await self._answered(answered)

    async def _answered(self, answer: asyncio.Future[bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                return await answer
        except TimeoutError:
            raise self._failed(_STALLED.format(self._stall_timeout_s)) from None

    def _failed(self, sentence: str) -> TransferError:
        """An answer that came before, such as why the receiver closed, says more than the broken pipe."""
        self._stream.listen()
        self._answers.fail(sentence)
        assert self.failure is not None
        return TransferError(self.failure)
