"""The prefill side: links to each receiver, used again from ticket to ticket."""

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.connection import MeasuredConnection
from kvtransfer.control import Address, layout_digest
from kvtransfer.interface import Offer
from kvtransfer.port import Place
from kvtransfer.runs import run_blocks_max, runs_of
from kvtransfer.tcp.answers import LOST
from kvtransfer.tcp.link import Link
from kvtransfer.tcp.proof import ticket_key
from kvtransfer.tcp.wire import TRANSPORT, Header, Kind
from kvtransfer.tls import TlsContexts

CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 30.0
IDLE_S = 30.0
"""How long a link is kept for the next ticket; less than a receiver keeps it."""
IDLE_LINKS_MAX = 8
"""Kept for each receiver."""
_TLS_ONLY_THERE = "The receiver takes KV blocks by TLS alone, which is not set up here (transport_tls_certificate)."
_TLS_ONLY_HERE = "The receiver does no TLS, without which no KV block leaves here (transport_tls_certificate)."


class TcpSender:
    """Lends a link to one connection at a time, so that a slow or broken ticket costs no other."""

    transport = TRANSPORT

    def __init__(
        self,
        place: Place,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self.region, self.metrics = place.region, place.metrics
        self._secret = place.secret
        self._tls = None if place.tls is None else TlsContexts(place.tls, is_server=False)
        self._connect_timeout_s, self._stall_timeout_s, self._idle_s = connect_timeout_s, stall_timeout_s, idle_s
        self._idle: dict[tuple[str, int], list[_IdleLink]] = {}
        self.connections: set[TcpConnection] = set()

    async def connect(self, offer: Offer, layout: KVLayout) -> "TcpConnection":
        address = Address.unpack(offer.descriptor)
        if address.is_tls != (self._tls is not None):
            raise TransferError(_TLS_ONLY_THERE if address.is_tls else _TLS_ONLY_HERE)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                link = await self._greet(address, layout_digest(layout))
        except TimeoutError:
            raise TransferError(
                f"The receiver at {address.host}:{address.port} did not answer within {self._connect_timeout_s:g} s."
            ) from None
        return TcpConnection(self, link, address, layout)

    async def _greet(self, address: Address, digest: bytes) -> Link:
        """A link on which the receiver has taken the ticket."""
        key = ticket_key(self._secret, address.secret)
        while (link := self._take_idle(address)) is not None:
            try:
                return await _greeted(link, address.ticket, key, digest)
            except TransferError:
                if link.failure != LOST:
                    raise
                # The receiver had dropped it meanwhile; the next one, or a new one, will do.
        tls = None if self._tls is None else self._tls.current()
        link = await Link.dial(address.host, address.port, self._stall_timeout_s, tls)
        return await _greeted(link, address.ticket, key, digest)

    def _take_idle(self, address: Address) -> Link | None:
        key = (address.host, address.port)
        while idle := self._idle.get(key):
            kept = idle.pop()
            kept.expiry.cancel()
            if not idle:
                del self._idle[key]
            if kept.link.failure is None:
                return kept.link
            kept.link.close(clean=True)
        return None

    def give_back(self, link: Link, address: Address) -> None:
        """After everything that it carried has been acknowledged."""
        idle = self._idle.setdefault((address.host, address.port), [])
        if len(idle) >= IDLE_LINKS_MAX:
            link.close(clean=True)
            return
        expiry = asyncio.get_running_loop().call_later(self._idle_s, self._expire, link, address)
        idle.append(_IdleLink(link, expiry))

    def _expire(self, link: Link, address: Address) -> None:
        key = (address.host, address.port)
        kept = [other for other in self._idle.pop(key) if other.link is not link]
        if kept:
            self._idle[key] = kept
        link.close(clean=True)

    async def close(self) -> None:
        for connection in tuple(self.connections):
            await connection.close()
        for idle in self._idle.values():
            for kept in idle:
                kept.expiry.cancel()
                kept.link.close(clean=True)
        self._idle.clear()


@dataclass(frozen=True, slots=True)
class _IdleLink:
    link: Link
    expiry: asyncio.TimerHandle


async def _greeted(link: Link, ticket: int, key: bytes, digest: bytes) -> Link:
    try:
        await link.greet(ticket, key, digest)
    except BaseException:
        link.close(clean=False)
        raise
    return link


class TcpConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(self, sender: TcpSender, link: Link, address: Address, layout: KVLayout) -> None:
        super().__init__(sender.region, layout, sender.metrics)
        self._sender, self._link, self._address = sender, link, address
        self._is_settled = True
        """Everything sent has been acknowledged, so the link can serve the next ticket."""
        sender.connections.add(self)

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self._is_settled = False
        head = Header(Kind.SLICES, self._address.ticket, layer, len(target)).pack()
        ids = struct.pack(f"!{len(target)}I", *target)
        if self._source.is_host:
            slices = self._read(layer, source)
        else:
            slices = await asyncio.to_thread(self._read, layer, source)
        await self._link.send([head + ids, *slices])

    def _read(self, layer: int, source: Sequence[BlockId]) -> list[memoryview]:
        """Keys of all blocks, then values of all blocks."""
        runs = tuple(runs_of(source, source, run_blocks_max(self._target)))
        return [self._source.readable(layer, kv, run.source, run.blocks) for kv in (0, 1) for run in runs]

    async def _fence(self) -> None:
        await self._link.fence(self._address.ticket)
        self._is_settled = True

    def _interrupt(self) -> None:
        self._link.interrupt()

    def _release(self) -> None:
        self._sender.connections.discard(self)
        if self._is_settled and self._link.is_reusable:
            self._sender.give_back(self._link, self._address)
        else:
            self._link.close(clean=False)
