"""The sending side: says which slices are ready, and is told when they have been read."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.connection import CLOSED, MeasuredConnection
from kvtransfer.control import Address, Fault, layout_digest
from kvtransfer.interface import Offer, Source
from kvtransfer.nixl.channel import Channel, Frame, Lost
from kvtransfer.nixl.driver import Driver
from kvtransfer.nixl.package import TRANSPORT
from kvtransfer.nixl.pipeline import READ_BYTES_MAX
from kvtransfer.nixl.proof import NONCE_BYTES, Greeting, Role, draw_nonce, ticket_key
from kvtransfer.nixl.segment import DeviceMemory
from kvtransfer.nixl.wire import READY_BLOCKS_MAX, READY_MAX, Hello, Kind, pack_source
from kvtransfer.port import AS_THEY_LIE, Place

CONNECT_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 30.0
"""How long the receiver may take to read what is ready before it is given up."""
LET_GO_S = 1.0
"""How long a write that is cancelled or closed waits for the receiver to end the read that it is in. One that does not
gets bytes that may have changed, and never learns that they were whole, so it never uses them."""


class NixlSender:
    transport = TRANSPORT

    def __init__(self, place: Place, driver: Driver, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self.place, self.driver, self.stall_timeout_s = place, driver, stall_timeout_s
        self.connections: set[NixlConnection] = set()
        self._starting = asyncio.Lock()
        self._is_up = False

    async def connect(self, offer: Offer, layout: KVLayout) -> "NixlConnection":
        address = Address.unpack(offer.descriptor)
        await self._bring_up()
        channel = await _dial(address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._greet(channel, address, layout)
        except TimeoutError:
            channel.cut()
            raise TransferError(f"The receiver did not answer within {CONNECT_TIMEOUT_S:g} s.") from None
        except BaseException:
            channel.cut()
            raise
        return NixlConnection(self, channel, layout)

    async def _bring_up(self) -> None:
        async with self._starting:
            if not self._is_up:
                await self.driver.acquire()
                self._is_up = True

    async def _greet(self, channel: Channel, address: Address, layout: KVLayout) -> None:
        hello = Hello(address.ticket, draw_nonce(), layout_digest(layout)).pack()
        channel.send(Kind.HELLO, hello)
        challenge = (await _expect(channel, Kind.CHALLENGE)).body
        greeting = Greeting(hello, challenge[:NONCE_BYTES], ticket_key(self.place.secret, address.secret))
        if not greeting.is_proven(challenge[NONCE_BYTES:], Role.RECEIVER):
            raise TransferError("The receiver did not prove that it gave this ticket, or has another cluster secret.")
        source = pack_source(self.driver.source)
        channel.send(Kind.SOURCE, greeting.proof(Role.SENDER, source) + source)
        channel.seal(greeting, Role.SENDER)
        await _expect(channel, Kind.WELCOME)

    async def close(self) -> None:
        for connection in tuple(self.connections):
            await connection.close()
            await connection.closed()
        if self._is_up:
            self._is_up = False
            await self.driver.release()


class NixlConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(self, sender: NixlSender, channel: Channel, layout: KVLayout) -> None:
        super().__init__(sender.place.region, layout, sender.place.metrics)
        self._sender, self._channel = sender, channel
        self._cutting: asyncio.TimerHandle | None = None
        self._unread = 0
        """Pieces that were announced, and are not known to have been read."""
        self._closing = asyncio.Lock()
        self._attention = ExitStack()
        """Held while there are any."""
        sender.connections.add(self)

    def read_from(self, source: Source) -> None:
        del source
        raise TransferError(AS_THEY_LIE)

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        if isinstance(self._source, DeviceMemory):
            await asyncio.to_thread(self._source.ready, layer)
        try:
            for count, body in _pieces(source, target, self._target):
                await self._until_unread(READY_MAX - 1)
                self._announce(layer, count, body)
                await asyncio.sleep(0)  # the loop's turn: what was read already is answered without waiting
        except asyncio.CancelledError:
            await self._let_go()
            raise

    def _announce(self, layer: int, count: int, body: bytes) -> None:
        if self._cutting is not None:
            raise TransferError(CLOSED)
        if not self._unread:
            self._attention.enter_context(self._sender.driver.attending())
        self._channel.send(Kind.READY, body, layer, count)
        self._unread += 1

    async def _until_unread(self, pieces: int) -> None:
        """So many at most. There should be several at a time, so that the receiver always knows what to read next."""
        while self._unread > pieces:
            await self._answer(Kind.READ)
            self._unread -= 1
        if not self._unread:
            self._attention.close()

    async def _fence(self) -> None:
        """What was read has landed; then this asks whether the ticket is open still."""
        try:
            await self._until_unread(0)
        except asyncio.CancelledError:
            await self._let_go()
            raise
        self._channel.send(Kind.FENCE)
        await self._answer(Kind.FENCED)

    async def _answer(self, kind: Kind) -> None:
        stall_timeout_s = self._sender.stall_timeout_s
        try:
            async with asyncio.timeout(stall_timeout_s):
                await _expect(self._channel, kind)
        except TimeoutError:
            raise TransferError(f"The receiver took nothing for {stall_timeout_s:g} s.") from None

    async def close(self) -> None:
        async with self._closing:
            if not self._idle.is_set():
                self._interrupt()
            self._broken = self._broken or CLOSED
            await self._idle.wait()
            if self._unread and not self._is_released:
                await self._let_go()
            await super().close()

    async def _let_go(self) -> None:
        """Returns when the receiver has ended the read that it is in, LET_GO_S at most."""
        self._interrupt()
        await self._channel.until_end()

    async def closed(self) -> None:
        """After `close`: returns when the socket is closed too."""
        await self._channel.closed()

    def _interrupt(self) -> None:
        self._channel.end()
        if self._cutting is None:
            self._cutting = asyncio.get_running_loop().call_later(LET_GO_S, self._channel.cut)

    def _release(self) -> None:
        if self._cutting is not None:
            self._cutting.cancel()
        self._sender.connections.discard(self)
        self._attention.close()
        self._channel.cut()


async def _dial(address: Address) -> Channel:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError; a host name may be none
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise TransferError(f"The receiver at {address.host}:{address.port} could not be reached: {reason}.") from None
    return Channel(reader, writer)


async def _expect(channel: Channel, kind: Kind) -> Frame:
    """Raises TransferError for any other answer, with the receiver's reason if it gave one."""
    try:
        frame = await channel.receive()
    except Lost:
        raise TransferError("The receiver closed the connection.") from None
    if frame.kind == Kind.ERROR and frame.count in tuple(Fault):
        raise TransferError(Fault(frame.count).sentence)
    if frame.kind != kind:
        raise TransferError("The receiver sent an answer that nobody asked for.")
    return frame


def _pieces(source: Sequence[BlockId], target: Sequence[BlockId], layout: KVLayout) -> Iterator[tuple[int, bytes]]:
    """How many blocks and their ids, as READY says them."""
    blocks_max = min(READY_BLOCKS_MAX, max(1, READ_BYTES_MAX // (2 * layout.slice_bytes)))
    for start in range(0, len(source), blocks_max):
        ids = np.array((source[start : start + blocks_max], target[start : start + blocks_max]), ">u4")
        yield ids.shape[1], ids.tobytes()
