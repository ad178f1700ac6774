"""The prefill side: one copy from its region into the decode worker's, in a thread of its own."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.connection import CLOSED, MeasuredConnection
from kvtransfer.interface import Offer, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.runs import copy_run, run_blocks_max, runs_of
from kvtransfer.shm.peers import IDLE_S, Peer, Peers
from kvtransfer.shm.table import TRANSPORT, Invitation
from kvtransfer.tickets import check_covered

COPY_THREADS = 2
"""One core copies at a good part of what memory can take; a second keeps a long write from holding up the rest."""


class ShmSender:
    """Owns the copy threads and the mappings of its peers."""

    transport = TRANSPORT

    def __init__(self, region: Region, metrics: TransferMetrics, idle_s: float = IDLE_S) -> None:
        self.region, self.metrics = region, metrics
        self.copiers = ThreadPoolExecutor(COPY_THREADS, "kv-shm-copy")
        self.peers = Peers(idle_s)
        self.connections: set[ShmConnection] = set()

    async def connect(self, offer: Offer, layout: KVLayout) -> "ShmConnection":
        invitation = Invitation.unpack(offer.descriptor)
        peer = self.peers.acquire(invitation)
        try:
            peer.check_alive()
            peer.check_open(invitation)
            if peer.region.layout != layout:
                raise TransferError("The region of the peer has another layout than it said.")
        except TransferError:
            self.peers.release(peer)
            raise
        return ShmConnection(self, peer, invitation)

    async def close(self) -> None:
        for connection in tuple(self.connections):
            await connection.close()
        self.peers.close()
        self.copiers.shutdown()


class ShmConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(self, sender: ShmSender, peer: Peer, invitation: Invitation) -> None:
        super().__init__(sender.region, peer.region.layout, sender.metrics)
        self._sender, self._peer, self._invitation = sender, peer, invitation
        self._blocks = frozenset(invitation.blocks)
        self._is_stopped = False
        sender.connections.add(self)

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        check_covered(self._blocks, target)
        work = self._sender.copiers.submit(self._copy, layer, tuple(source), tuple(target))
        copied = asyncio.wrap_future(work)
        try:
            await asyncio.shield(copied)
        except asyncio.CancelledError:
            self._is_stopped = True
            if not work.cancel():
                await _ended(copied)
            raise

    def _copy(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        """In a copy thread."""
        self._peer.check_alive()
        for run in runs_of(source, target, run_blocks_max(self._target)):
            if self._is_stopped:
                raise TransferError(CLOSED)
            self._peer.check_open(self._invitation)
            for kv in (0, 1):
                place = self._peer.region.writable(layer, kv, run.target, run.blocks)
                copy_run(self._source, layer, kv, run, place)

    async def _fence(self) -> None:
        self._peer.check_alive()
        self._peer.check_open(self._invitation)

    def _interrupt(self) -> None:
        self._is_stopped = True

    def _release(self) -> None:
        self._sender.connections.discard(self)
        self._sender.peers.release(self._peer)


async def _ended(copied: "asyncio.Future[None]") -> None:
    """Waits, whoever else cancels: at most for the copy of one run, which reads blocks that may change after."""
    while not copied.done():
        try:
            await asyncio.wait((copied,))
        except asyncio.CancelledError:
            continue
    copied.exception()  # that it was stopped is no news
