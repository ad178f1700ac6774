"""Two workers in one process, one of which fetches blocks by name from the other over real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from baton.errors import BatonError
from baton.ids import BlockHash, BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2_grpc
from baton.rpc.channels import Channels
from kvtransfer.fetch.client import Fetched, Fetcher
from kvtransfer.fetch.servicer import FetchContext, FetchServicer
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Connection, Offer
from kvtransfer.link.client import Links
from kvtransfer.link.expectation import Expectations
from kvtransfer.link.identity import LinkIdentity
from kvtransfer.link.metrics import LinkMetrics
from kvtransfer.link.servicer import LinkBook, LinkContext, PeerLink
from kvtransfer.region import HostRegion
from kvtransfer.registry import Ports, make_ports
from kvtransfer.verify import Policy, Verifier, VerifyMetrics
from tests.kvtransfer.transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT, fill_random, ids, slices

SECRET = b"0123456789abcdef0123456789abcdef"
HAS = 12
"""The sender's cache has blocks named 0 to 11, the one named i in block HAS - i."""
RESERVED = ids(3, 4, 5, 9, 7, 20, 21, 22, 23, 24, 29, 28, 27, 26)
"""Of the receiver."""


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


@dataclass(frozen=True)
class Held:
    blocks: tuple[BlockId, ...]
    digests: tuple[int, ...]


@dataclass
class Source:
    """A BlockSource over a region; `held` are the blocks that it may not give away now."""

    region: HostRegion
    held: list[BlockId] = field(default_factory=list)
    makes_digests: bool = True

    @asynccontextmanager
    async def hold(self, names: Sequence[BlockHash]) -> AsyncIterator[Held]:
        blocks = []
        for wanted in names:
            if int.from_bytes(wanted, "little") >= HAS:
                break
            blocks.append(BlockId(HAS - int.from_bytes(wanted, "little")))
        self.held += blocks
        try:
            yield Held(tuple(blocks), tuple(self.region.digests(blocks)) if self.makes_digests else ())
        finally:
            for block in blocks:
                self.held.remove(block)


BeforeWrite = Callable[[int, Sequence[BlockId]], Awaitable[Sequence[BlockId]]]
"""Of a layer and its source blocks: those to send in their place."""


class TrickyConnection:
    """A connection that does something first."""

    def __init__(self, inner: Connection, before_write: BeforeWrite) -> None:
        self._inner, self._before_write = inner, before_write

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        await self._inner.write(layer, await self._before_write(layer, source), target)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)


class TrickyBook(LinkBook):
    before_write: BeforeWrite | None = None

    async def connect(self, peer: PeerLink, request_id: RequestId, offers: Sequence[Offer]) -> Connection:
        connection = await super().connect(peer, request_id, offers)
        return connection if self.before_write is None else TrickyConnection(connection, self.before_write)


class Servicer(transfer_pb2_grpc.TransferServicer):
    def __init__(self, book: LinkBook, fetch: FetchServicer) -> None:
        self._book, self._fetch = book, fetch

    async def Link(self, request_iterator: object, context: LinkContext) -> None:  # noqa: N802 - gRPC's name
        del request_iterator
        await self._book.serve(context)

    async def Fetch(self, request_iterator: object, context: FetchContext) -> None:  # noqa: N802 - gRPC's name
        del request_iterator
        await self._fetch.serve(context)


@dataclass
class Rig:
    source: HostRegion
    target: HostRegion
    cache: Source
    book: TrickyBook
    servicer: FetchServicer
    fetcher: Fetcher
    links: Links
    channels: Channels
    receiving: Ports
    server: grpc.aio.Server
    address: str
    metrics: CollectorRegistry
    sent: list[tuple[int, float]]
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def fetch(self, numbers: Sequence[int], deadline_s: float = 10.0) -> Fetched:
        """By a link that is made before, where that is possible: a fetch waits for none."""
        with contextlib.suppress(BatonError):
            await self.links.to(self.address)
        names = [name(number) for number in numbers]
        reserved = RESERVED[: len(names)]
        return await self.fetcher.fetch(self.address, RequestId("a"), names, reserved, deadline_s, self.cancelled)

    def came(self, number: int, index: int) -> bool:
        """Whether the block named so lies in the reserved block of that index."""
        there, here = slices(self.source)[:, :, HAS - number], slices(self.target)[:, :, RESERVED[index]]
        return bool((there == here).all())

    def came_in_order(self, blocks: int) -> bool:
        """The blocks named 0 and up, so many and no more."""
        return [self.came(i, i) for i in range(HAS)] == [i < blocks for i in range(HAS)]

    async def until_let_go(self) -> None:
        async with asyncio.timeout(30):
            while self.cache.held or len(self.servicer):  # noqa: ASYNC110 - gRPC tells nobody
                await asyncio.sleep(0.005)


def _ignore(size_bytes: int, seconds: float) -> None:
    del size_bytes, seconds


@asynccontextmanager
async def rig(
    transport: str = "inproc",
    source_layout: KVLayout = SOURCE_LAYOUT,
    target_layout: KVLayout = TARGET_LAYOUT,
    policy: Policy = "always",
    fingerprint: str = "f",
    **options: Any,
) -> AsyncIterator[Rig]:
    hub, channels, metrics, sent = InprocHub(), Channels(), CollectorRegistry(), list[tuple[int, float]]()
    source, target = HostRegion.allocate(source_layout), HostRegion.allocate(target_layout)
    fill_random(source, seed=1)
    sending = make_ports([transport], source, CollectorRegistry(), hub=hub)
    receiving = make_ports([transport], target, metrics, hub=hub)
    sender, receiver = LinkIdentity("p", "f", source_layout), LinkIdentity("d", "f", target_layout)
    expected = Expectations(memory=lambda: 1.0)
    book = TrickyBook(sending, sender, SECRET, True, LinkMetrics(CollectorRegistry()), expectations=expected)
    links = Links(receiving, receiver, SECRET, True, channels.to, LinkMetrics(metrics), _ignore)
    cache = Source(source)
    servicer = FetchServicer(
        book, cache, "f", source_layout, on_sent=lambda size, seconds: sent.append((size, seconds)), **options
    )
    verifier = Verifier(target, policy, VerifyMetrics(metrics), Random(0))
    fetcher = Fetcher(links, receiving, channels.to, verifier, fingerprint, target_layout)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    transfer_pb2_grpc.add_TransferServicer_to_server(Servicer(book, servicer), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield Rig(
            *(source, target, cache, book, servicer, fetcher, links, channels, receiving, server, address, metrics),
            sent,
        )
    finally:
        await fetcher.close()
        await links.close()
        await channels.close()
        await server.stop(0)
        await servicer.close()
        for ports, region in ((receiving, target), (sending, source)):
            await ports.close()
            region.close()
