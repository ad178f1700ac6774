"""The sending end of one link: says what comes, sends it, and listens for answers."""

import asyncio
import os
import secrets
import struct
from collections.abc import Sequence

from baton.errors import TransferError
from kvtransfer.control import Fault
from kvtransfer.tcp.proof import NONCE_BYTES, Greeting, Role
from kvtransfer.ucx.channel import Channel
from kvtransfer.ucx.context import Context
from kvtransfer.ucx.lane import Lane
from kvtransfer.ucx.wire import COUNT, FAULT, TRIAL_BYTES, Frame, Hello, Kind, Welcome, tag_of

UNDER_WAY_MAX = 32
"""Messages, of a run each; when it is reached, more are sent once half of them are done."""
EXPLANATION_S = 0.5
"""How long after UCX lost the peer its last words are waited for, which say more."""
LOST = "The receiver closed the connection."
_STALLED = "The receiver took nothing for {:g} s."
_UNASKED = "The receiver sent an answer that nobody asked for."
INTERRUPTED = "The connection was interrupted."


class Link:
    """Carries one ticket at a time. After any error it is only good for `close`.

    Raises TransferError when the peer is gone, refuses, or takes nothing for `stall_timeout_s`.
    """

    def __init__(self, context: Context, stall_timeout_s: float) -> None:
        self._context, self._stall_timeout_s = context, stall_timeout_s
        self._channel: Channel | None = None
        self._lane: Lane | None = None
        self._challenge, self._hellos, self._fences = b"", 0, 0
        self._tags, self._number = 0, 0
        self._answers: dict[tuple[Kind, int], asyncio.Future[Frame]] = {}
        """Awaited, by kind and count."""
        self._under_way, self._enough = 0, 0
        self._is_enough = asyncio.Event()
        """No more messages are under way than is enough for who waits, or the link failed."""
        self.failure: str | None = None
        """Why it cannot be used any more; a sentence."""

    @classmethod
    async def dial(cls, context: Context, host: str, port: int, stall_timeout_s: float) -> "Link":
        link = cls(context, stall_timeout_s)
        challenged = link._await_answer(Kind.CHALLENGE, 0)
        try:
            await asyncio.get_running_loop().create_connection(lambda: Channel(link), host, port)
            link._challenge = (await challenged).body
        except (OSError, ValueError) as error:
            challenged.cancel()
            reason = (
                os.strerror(error.errno or 0) if isinstance(error, OSError) and (error.errno or 0) > 0 else str(error)
            )
            raise TransferError(f"The receiver at {host}:{port} could not be reached: {reason}.") from None
        except BaseException:
            challenged.cancel()
            link.close()
            raise
        return link

    async def greet(self, ticket: int, key: bytes, layout_digest: bytes) -> None:
        """The receiver takes what follows as the ticket's; `key` is kvtransfer.tcp.proof's. Also makes the way by UCX,
        the first time, and tries it. The caller bounds the wait."""
        self._hellos += 1
        if is_first := self._lane is None:
            self._lane = Lane(self._context)
        assert self._lane is not None
        address = self._lane.address if is_first else b""
        nonce, said = secrets.token_bytes(NONCE_BYTES), layout_digest + address
        proof = Greeting(self._challenge, nonce, self._hellos, ticket, said).proof(Role.SENDER, key)
        hello = Hello(self._hellos, ticket, nonce, layout_digest, proof, address)
        answer = await self._ask(Frame(Kind.HELLO, hello.pack()), Kind.WELCOME, self._hellos)
        try:
            welcome = Welcome.unpack(answer.body)
        except struct.error:
            raise self._failed(_UNASKED) from None
        answered = Greeting(self._challenge, nonce, self._hellos, ticket, said + welcome.said)
        if not answered.is_proven(welcome.proof, Role.RECEIVER, key) or bool(welcome.address) != is_first:
            raise self._failed("The receiver did not prove that it gave the ticket.")
        if is_first:
            await self._try_way(welcome)

    async def _try_way(self, welcome: Welcome) -> None:
        assert self._lane is not None
        self._tags = welcome.tags
        tried = self._await_answer(Kind.ACK, 0)
        try:
            self._lane.connect(welcome.address)
            self._send(memoryview(bytes(TRIAL_BYTES)))
            await tried
        finally:
            tried.cancel()

    async def send(self, announcement: Frame, views: Sequence[memoryview]) -> None:
        """The views are the messages that the SLICES frame names. Returns when they may change again."""
        self.check()
        assert self._channel is not None
        self._channel.send(announcement)
        for view in views:
            if self._under_way >= UNDER_WAY_MAX:
                await self._until_left(UNDER_WAY_MAX // 2)
            self._send(view)
        await self._until_left(0)

    async def fence(self) -> None:
        self._fences += 1
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._ask(Frame(Kind.FENCE, COUNT.pack(self._fences)), Kind.ACK, self._fences)
        except TimeoutError:
            raise self._failed(_STALLED.format(self._stall_timeout_s)) from None

    def check(self) -> None:
        if self.failure is not None:
            raise TransferError(self.failure)

    def close(self, failure: str = "The connection is closed.") -> None:
        """Idempotent. When it returns nothing is read any more of what it was sending; whoever waits is told why."""
        if self.failure is not None:
            return
        self.failure = failure
        if self._lane is not None:
            self._lane.close()
        if self._channel is not None:
            self._channel.abort()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(TransferError(failure))
        self._is_enough.set()

    # ---- messages

    def _send(self, view: memoryview) -> None:
        self.check()
        assert self._lane is not None
        try:
            self._lane.send(view, tag_of(self._tags, self._number), self._on_sent)
        except TransferError as error:
            raise self._failed(str(error)) from None
        self._number += 1
        self._under_way += 1

    def _on_sent(self, error: TransferError | None) -> None:
        self._under_way -= 1
        if self._under_way <= self._enough:
            self._is_enough.set()
        if error is not None:
            asyncio.get_running_loop().call_later(EXPLANATION_S, self.close, LOST)

    async def _until_left(self, messages: int) -> None:
        """Returns when no more are under way."""
        if self._under_way > messages:
            self._enough = messages
            self._is_enough.clear()
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    await self._is_enough.wait()
            except TimeoutError:
                raise self._failed(_STALLED.format(self._stall_timeout_s)) from None
        self.check()

    # ---- answers

    async def _ask(self, frame: Frame, kind: Kind, count: int) -> Frame:
        self.check()
        assert self._channel is not None
        answer = self._await_answer(kind, count)
        self._channel.send(frame)
        return await answer

    def _await_answer(self, kind: Kind, count: int) -> "asyncio.Future[Frame]":
        answer = self._answers[kind, count] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._answers.pop((kind, count)))
        return answer

    def on_connected(self, channel: Channel) -> None:
        self._channel = channel
        if self.failure is not None:
            channel.abort()

    def on_frame(self, frame: Frame) -> None:
        try:
            self._take(frame)
        except (struct.error, ValueError, KeyError):
            self.close(_UNASKED)

    def _take(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.ERROR:
                self.close(Fault(*FAULT.unpack(frame.body)).sentence)
            case Kind.CHALLENGE:
                self._answers[Kind.CHALLENGE, 0].set_result(frame)
            case _:
                (count,) = COUNT.unpack_from(frame.body)
                self._answers[Kind(frame.kind), count].set_result(frame)

    def on_lost(self) -> None:
        self.close(LOST)

    def _failed(self, sentence: str) -> TransferError:
        self.close(sentence)
        assert self.failure is not None
        return TransferError(self.failure)
