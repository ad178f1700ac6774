"""The prefill side: links to each receiver, used again from ticket to ticket."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.connection import MeasuredConnection
from kvtransfer.control import Address, layout_digest
from kvtransfer.interface import Offer
from kvtransfer.port import Place
from kvtransfer.runs import Run, run_blocks_max, runs_of
from kvtransfer.tcp.proof import ticket_key
from kvtransfer.ucx.context import Context
from kvtransfer.ucx.link import INTERRUPTED, LOST, Link
from kvtransfer.ucx.wire import RUNS_MAX, TRANSPORT, Frame, Kind, TargetRun, pack_runs

CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 30.0
IDLE_S = 30.0
"""How long a link is kept for the next ticket; less than a receiver keeps it."""
IDLE_LINKS_MAX = 8
"""Kept for each receiver."""


@dataclass(frozen=True, slots=True)
class _IdleLink:
    link: Link
    expiry: asyncio.TimerHandle


class UcxSender:
    """Lends a link to one connection at a time, so that a slow or broken ticket costs no other."""

    transport = TRANSPORT

    def __init__(
        self,
        place: Place,
        context: Context,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self.place, self._context = place, context
        self._connect_timeout_s, self._stall_timeout_s, self._idle_s = connect_timeout_s, stall_timeout_s, idle_s
        self._idle: dict[tuple[str, int], list[_IdleLink]] = {}
        self.connections: set[UcxConnection] = set()

    async def connect(self, offer: Offer, layout: KVLayout) -> "UcxConnection":
        address = Address.unpack(offer.descriptor)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                link = await self._greeted(address, layout)
        except TimeoutError:
            raise TransferError(
                f"The receiver at {address.host}:{address.port} did not answer within {self._connect_timeout_s:g} s."
            ) from None
        return UcxConnection(self, link, address, layout)

    async def _greeted(self, address: Address, layout: KVLayout) -> Link:
        """A link on which the receiver has taken the ticket."""
        while (link := self._take_idle(address)) is not None:
            try:
                return await self._greet(link, address, layout)
            except TransferError:
                if link.failure != LOST:
                    raise
                # The receiver had dropped it meanwhile; the next one, or a new one, will do.
        link = await Link.dial(self._context, address.host, address.port, self._stall_timeout_s)
        return await self._greet(link, address, layout)

    async def _greet(self, link: Link, address: Address, layout: KVLayout) -> Link:
        try:
            await link.greet(address.ticket, ticket_key(self.place.secret, address.secret), layout_digest(layout))
        except BaseException:
            link.close(INTERRUPTED)
            raise
        return link

    def _take_idle(self, address: Address) -> Link | None:
        key = (address.host, address.port)
        while idle := self._idle.get(key):
            kept = idle.pop()
            kept.expiry.cancel()
            if not idle:
                del self._idle[key]
            if kept.link.failure is None:
                return kept.link
        return None

    def give_back(self, link: Link, address: Address) -> None:
        """After everything that it carried has been acknowledged."""
        idle = self._idle.setdefault((address.host, address.port), [])
        if len(idle) >= IDLE_LINKS_MAX:
            link.close()
            return
        expiry = asyncio.get_running_loop().call_later(self._idle_s, self._expire, link, address)
        idle.append(_IdleLink(link, expiry))

    def _expire(self, link: Link, address: Address) -> None:
        key = (address.host, address.port)
        kept = [other for other in self._idle.pop(key) if other.link is not link]
        if kept:
            self._idle[key] = kept
        link.close()

    async def close(self) -> None:
        for connection in tuple(self.connections):
            await connection.close()
        for idle in self._idle.values():
            for kept in idle:
                kept.expiry.cancel()
                kept.link.close()
        self._idle.clear()


class UcxConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(self, sender: UcxSender, link: Link, address: Address, layout: KVLayout) -> None:
        super().__init__(sender.place.region, layout, sender.place.metrics)
        self._sender, self._link, self._address = sender, link, address
        self._is_settled = True
        """Everything sent has been acknowledged, so the link can serve the next ticket."""
        sender.connections.add(self)

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self._is_settled = False
        runs = runs_of(source, target, run_blocks_max(self._target))
        try:
            while some := tuple(islice(runs, RUNS_MAX)):
                targets = [TargetRun(run.target, run.blocks) for run in some]
                views = await self._views(layer, some)
                await self._link.send(Frame(Kind.SLICES, pack_runs(targets), layer), views)
        except asyncio.CancelledError:
            self._link.close(INTERRUPTED)  # by that the source is no longer read
            raise

    async def _views(self, layer: int, runs: Sequence[Run]) -> Sequence[memoryview]:
        if self._source.is_host:
            return self._read(layer, runs)
        return await asyncio.to_thread(self._read, layer, runs)

    def _read(self, layer: int, runs: Sequence[Run]) -> list[memoryview]:
        """The keys of each run, then the values of each."""
        return [self._source.readable(layer, kv, run.source, run.blocks) for kv in (0, 1) for run in runs]

    async def _fence(self) -> None:
        await self._link.fence()
        self._is_settled = True

    def _interrupt(self) -> None:
        self._link.close(INTERRUPTED)

    def _release(self) -> None:
        self._sender.connections.discard(self)
        if self._is_settled and self._link.failure is None:
            self._sender.give_back(self._link, self._address)
        else:
            self._link.close()
