"""The receiving end of one control connection: who is there, and what it has ready."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from baton.clock import monotonic
from baton.errors import TransferError
from kvtransfer.control import Fault, layout_digest
from kvtransfer.nixl.agent import Peer
from kvtransfer.nixl.channel import Channel, Frame, Lost, Malformed
from kvtransfer.nixl.package import TRANSPORT
from kvtransfer.nixl.peers import Peers
from kvtransfer.nixl.pipeline import Read
from kvtransfer.nixl.proof import PROOF_BYTES, Greeting, Role, draw_nonce, ticket_key
from kvtransfer.nixl.segment import slice_indices
from kvtransfer.nixl.wire import READY_BLOCKS_MAX, READY_MAX, Hello, Kind, unpack_source
from kvtransfer.port import Place
from kvtransfer.tickets import Ticket, TicketBook


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may keep the receiver waiting, in seconds."""

    hello_s: float = 5.0
    """From its start to its proof."""
    linger_s: float = 1.0
    """From a refusal until the connection is cut, so that the peer can read why."""


PATIENCE = Patience()


class Receiving(Protocol):
    """What its connections need of the receiver."""

    place: Place
    patience: Patience
    tickets: TicketBook
    peers: Peers

    def begin(self, ticket: Ticket, read: Read) -> None:
        """Raises TransferError if the ticket was closed."""


class _Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.sentence)
        self.fault = fault


class Inflow:
    """Whatever comes, `run` raises nothing, and what is under way is bounded."""

    def __init__(self, receiver: Receiving, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._receiver, self._channel = receiver, Channel(reader, writer)
        self._layout = receiver.place.region.layout
        self._ticket: Ticket | None = None
        self._peer: Peer | None = None
        self._reads = 0
        self._all_read = asyncio.Event()
        self._all_read.set()
        self._is_over = False
        """It was refused, or the other end is gone: nothing more is taken or begun."""
        self._cutting: asyncio.TimerHandle | None = None

    @property
    def is_proven(self) -> bool:
        return self._ticket is not None

    def cut(self) -> None:
        self._is_over = True
        self._channel.cut()

    async def closed(self) -> None:
        await self._channel.closed()

    def on_ticket_closed(self, ticket: Ticket) -> None:
        if self._ticket is ticket:
            self._refuse(Fault.TICKET_CLOSED, is_failure=False)

    async def run(self) -> None:
        patience = self._receiver.patience
        try:
            async with asyncio.timeout(patience.hello_s):
                ticket, peer = await self._greet()
            while not self._is_over:
                self._take(ticket, peer, await self._channel.receive())
        except (Lost, TimeoutError):
            pass
        except (_Refused, Malformed) as refused:
            self._refuse(refused.fault if isinstance(refused, _Refused) else Fault.MALFORMED)
        finally:
            self._is_over = True
            if self._peer is not None:
                self._receiver.peers.release(self._peer)
        await self._linger(patience.linger_s)

    async def _linger(self, linger_s: float) -> None:
        """The sender that ended the connection waits for the end of this side, which comes when nothing reads there."""
        try:
            async with asyncio.timeout(linger_s):
                await self._all_read.wait()
                self._channel.end()
                await self._channel.until_end()
        except TimeoutError:
            pass
        if self._cutting is not None:
            self._cutting.cancel()

    # ---- the greeting

    async def _greet(self) -> tuple[Ticket, Peer]:
        ticket, greeting = await self._meet(await self._channel.receive())
        frame = await self._channel.receive()
        proof, said = frame.body[:PROOF_BYTES], frame.body[PROOF_BYTES:]
        if frame.kind != Kind.SOURCE or not greeting.is_proven(proof, Role.SENDER, said):
            raise _Refused(Fault.UNAUTHORIZED)
        peer = self._peer = await self._reach(said)
        self._ticket = ticket
        if not ticket.is_open:
            raise _Refused(Fault.TICKET_CLOSED)
        self._channel.seal(greeting, Role.RECEIVER)
        self._channel.send(Kind.WELCOME)
        self._receiver.place.metrics.connected(TRANSPORT, "in")
        return ticket, peer

    async def _meet(self, frame: Frame) -> tuple[Ticket, Greeting]:
        hello = Hello.unpack(frame.body)
        if frame.kind != Kind.HELLO or hello is None:
            raise _Refused(Fault.MALFORMED)
        ticket = self._receiver.tickets.find(hello.ticket)
        if ticket is None:
            raise _Refused(Fault.UNAUTHORIZED)
        if hello.layout_digest != layout_digest(self._layout):
            raise _Refused(Fault.LAYOUT)
        key = ticket_key(self._receiver.place.secret, ticket.secret)
        greeting = Greeting(frame.body, draw_nonce(), key)
        self._channel.send(Kind.CHALLENGE, greeting.challenge + greeting.proof(Role.RECEIVER))
        return ticket, greeting

    async def _reach(self, said: bytes) -> Peer:
        try:
            source = unpack_source(said)
            if not self._layout.is_compatible(source.layout):
                raise _Refused(Fault.LAYOUT)
            return await self._receiver.peers.acquire(source)
        except TransferError:
            raise _Refused(Fault.UNREADABLE) from None

    # ---- what is ready

    def _take(self, ticket: Ticket, peer: Peer, frame: Frame) -> None:
        if self._is_over:
            return
        match frame.kind:
            case Kind.READY:
                self._begin(ticket, peer, frame)
            case Kind.FENCE if self._reads == 0:
                self._channel.send(Kind.FENCED)
            case _:
                raise _Refused(Fault.MALFORMED)

    def _begin(self, ticket: Ticket, peer: Peer, frame: Frame) -> None:
        count = frame.count
        is_sound = 1 <= count <= READY_BLOCKS_MAX and len(frame.body) == 8 * count
        if not is_sound or frame.layer >= self._layout.layers or self._reads >= READY_MAX:
            raise _Refused(Fault.MALFORMED)
        ids = np.frombuffer(frame.body, ">u4")
        source, target = ids[:count], ids[count:]
        if int(source.max()) >= peer.source.layout.blocks:
            raise _Refused(Fault.MALFORMED)
        if not ticket.blocks.issuperset(target.tolist()):
            raise _Refused(Fault.BLOCK_OUTSIDE)
        self._read(ticket, peer, frame.layer, source.astype(np.int32), target.astype(np.int32))

    def _read(self, ticket: Ticket, peer: Peer, layer: int, source: "_Ids", target: "_Ids") -> None:
        size_bytes = 2 * len(target) * self._layout.slice_bytes
        started_s = monotonic()
        ended = asyncio.get_running_loop().create_future()
        ended.add_done_callback(lambda ended: self._on_ended(size_bytes, started_s, ended))
        local, remote = slice_indices(self._layout, layer, target), slice_indices(peer.source.layout, layer, source)
        self._reads += 1
        self._all_read.clear()
        self._receiver.begin(ticket, Read(peer, local, remote, size_bytes, lambda: self._wants(ticket), ended))

    def _wants(self, ticket: Ticket) -> bool:
        """Asked on NIXL's thread."""
        return ticket.is_open and not self._is_over

    def _on_ended(self, size_bytes: int, started_s: float, ended: "asyncio.Future[None]") -> None:
        self._reads -= 1
        if not self._reads:
            self._all_read.set()
        if ended.exception() is None:
            self._receiver.place.metrics.moved(TRANSPORT, "in", size_bytes, monotonic() - started_s)
        if self._is_over:
            return
        if ended.exception() is not None:
            self._refuse(Fault.UNREADABLE)
        else:
            self._channel.send(Kind.READ)

    def _refuse(self, fault: Fault, is_failure: bool = True) -> None:
        if self._is_over:
            return
        self._is_over = True
        if is_failure:
            self._receiver.place.metrics.failed(TRANSPORT, "in")
        self._channel.refuse(fault)
        self._cutting = asyncio.get_running_loop().call_later(self._receiver.patience.linger_s, self._channel.cut)


_Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
