"""The prefill side: one copy from its region into the decode worker's, in a thread of its own unless it is small."""

import asyncio
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.connection import CLOSED, MeasuredConnection
from kvtransfer.interface import Offer, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.runs import RUN_BYTES_MAX, rows_of, run_blocks_max, runs_of, source_rows
from kvtransfer.shm.fence import enter, leave
from kvtransfer.shm.peers import IDLE_S, Peer, Peers
from kvtransfer.shm.table import TRANSPORT, Invitation
from kvtransfer.tickets import check_covered

COPY_THREADS = 2
"""One core copies at a good part of what memory can take; a second keeps a long write from holding up the rest."""
INLINE_BYTES_MAX = 2 * 2**20
"""Copied on the loop, which takes less than handing it to a thread and back costs both;"""
PIECE_BYTES_MAX = 512 * 1024
"""of these, about 40 us, it copies one a turn, and everybody else has theirs."""


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
            _check(peer, invitation, layout)
            peer.claim(invitation.ticket)
        except TransferError:
            self.peers.release(peer)
            raise
        return ShmConnection(self, peer, invitation)

    async def close(self) -> None:
        for connection in tuple(self.connections):
            await connection.close()
        self.peers.close()
        self.copiers.shutdown()


def _check(peer: Peer, invitation: Invitation, layout: KVLayout) -> None:
    peer.check_alive()
    peer.check_open(invitation)
    if peer.region.layout != layout:
        raise TransferError("The region of the peer has another layout than it said.")
    if max(invitation.blocks, default=0) >= layout.blocks:
        raise TransferError("The ticket names blocks that the region of the peer does not have.")


class ShmConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(self, sender: ShmSender, peer: Peer, invitation: Invitation) -> None:
        super().__init__(sender.region, peer.region.layout, sender.metrics)
        self._sender, self._peer, self._invitation = sender, peer, invitation
        self._blocks = frozenset(invitation.blocks)
        self._is_stopped = False
        self._turn_bytes = 0
        """Copied in this turn of the loop."""
        sender.connections.add(self)

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        check_covered(self._blocks, target)
        if self._source.is_host and 2 * len(source) * self._target.slice_bytes <= INLINE_BYTES_MAX:
            await self._copy_here(layer, source, target)
        else:
            await self._copy_in_thread(layer, source, target)

    async def _copy_here(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        with closing(self._copy(layer, source, target, PIECE_BYTES_MAX // 2)) as runs:
            for size_bytes in runs:
                self._turn_bytes += size_bytes
                if self._turn_bytes >= PIECE_BYTES_MAX:
                    self._turn_bytes = 0
                    await asyncio.sleep(0)

    async def _copy_in_thread(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self._peer.check_alive()
        work = self._sender.copiers.submit(_exhaust, self._copy(layer, tuple(source), tuple(target), RUN_BYTES_MAX))
        copied = asyncio.wrap_future(work)
        try:
            await asyncio.shield(copied)
        except asyncio.CancelledError:
            self._is_stopped = True
            if not work.cancel():
                await _ended(copied)
            raise

    def _copy(
        self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId], run_bytes_max: int
    ) -> Generator[int, None, None]:
        """The bytes of each run, once it is copied: at most `run_bytes_max` of its keys, and of its values. Looks
        before each whether it may go on, and says for as long as it is at it that it is."""
        enter(self._peer.table.fd, self._invitation.ticket)
        try:
            read, region = source_rows(self._source, layer), self._peer.region
            places = [rows_of(region.writable(layer, kv, 0, region.layout.blocks), region.layout) for kv in (0, 1)]
            for run in runs_of(source, target, run_blocks_max(region.layout, run_bytes_max)):
                self._check_wanted()
                for kv in (0, 1):
                    np.copyto(places[kv][run.target : run.target + run.blocks], read(kv, run))
                yield 2 * run.blocks * region.layout.slice_bytes
        finally:
            leave(self._peer.table.fd, self._invitation.ticket)

    def _check_wanted(self) -> None:
        if self._is_stopped:
            raise TransferError(CLOSED)
        self._peer.check_open(self._invitation)

    async def _fence(self) -> None:
        self._peer.check_alive()
        self._peer.check_open(self._invitation)

    def _interrupt(self) -> None:
        self._is_stopped = True

    def _release(self) -> None:
        self._sender.connections.discard(self)
        self._peer.disclaim(self._invitation.ticket)
        self._sender.peers.release(self._peer)


def _exhaust(copying: Generator[int, None, None]) -> None:
    """In a copy thread."""
    for _ in copying:
        pass


async def _ended(copied: "asyncio.Future[None]") -> None:
    """Waits, whoever else cancels: at most for the copy of one run, which reads blocks that may change after."""
    while not copied.done():
        try:
            await asyncio.wait((copied,))
        except asyncio.CancelledError:
            continue
    copied.exception()  # that it was stopped is no news
