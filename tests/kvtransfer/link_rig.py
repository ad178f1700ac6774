"""Two workers' ends of links in one process, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry
from transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT, fill_random

from baton.clock import Clock, monotonic
from baton.layout import KVLayout
from baton.rpc import transfer_pb2_grpc
from baton.rpc.channels import Channels
from kvtransfer.inproc import InprocHub
from kvtransfer.link.client import Links
from kvtransfer.link.expectation import Expectations
from kvtransfer.link.identity import LinkIdentity
from kvtransfer.link.metrics import LinkMetrics
from kvtransfer.link.servicer import LinkBook, LinkContext
from kvtransfer.region import HostRegion
from kvtransfer.registry import Ports, make_ports

SECRET = b"0123456789abcdef0123456789abcdef"


class _Servicer(transfer_pb2_grpc.TransferServicer):
    def __init__(self, book: LinkBook) -> None:
        self.book = book

    async def Link(self, request_iterator: object, context: LinkContext) -> None:  # noqa: N802 - gRPC's name
        del request_iterator
        await self.book.serve(context)


@dataclass
class Sender:
    """A worker that sends: a gRPC server with its book of links."""

    region: HostRegion
    ports: Ports
    book: LinkBook
    registry: CollectorRegistry
    measured: list[tuple[int, float]]
    address: str = ""
    server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        transfer_pb2_grpc.add_TransferServicer_to_server(_Servicer(self.book), self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            await asyncio.sleep(0)


@dataclass
class Receiver:
    """A worker that receives."""

    region: HostRegion
    ports: Ports
    links: Links
    registry: CollectorRegistry
    measured: list[tuple[int, float]]


@dataclass
class Rig:
    sender: Sender
    receiver: Receiver
    channels: Channels
    hub: InprocHub

    def metric(self, name: str, *, of_sender: bool = False, **labels: str) -> float | None:
        worker = self.sender if of_sender else self.receiver
        return worker.registry.get_sample_value(name, labels)

    async def until(self, holds: Any) -> None:
        """Until what streams tell has arrived."""
        async with asyncio.timeout(30):
            while not holds():  # noqa: ASYNC110 - gRPC tells nobody
                await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Side:
    """How one of the two is set up."""

    transports: Sequence[str] = ("shm", "tcp")
    secret: bytes | None = SECRET
    fingerprint: str = "f"
    options: dict[str, Any] = field(default_factory=dict)


def make_sender(side: Side, hub: InprocHub, layout: KVLayout = SOURCE_LAYOUT, clock: Clock = monotonic) -> Sender:
    region, registry, measured = HostRegion.allocate(layout), CollectorRegistry(), list[tuple[int, float]]()
    fill_random(region, seed=1)
    ports = make_ports(side.transports, region, registry, hub=hub)
    options: dict[str, Any] = {"makes_digests": True, "expectations": Expectations(memory=lambda: 1.0)} | side.options
    me = LinkIdentity("prefill-0", side.fingerprint, layout)
    book = LinkBook(
        ports,
        me,
        side.secret,
        metrics=LinkMetrics(registry),
        clock=clock,
        on_measured=lambda size, seconds: measured.append((size, seconds)),
        **options,
    )
    return Sender(region, ports, book, registry, measured)


def make_receiver(
    side: Side,
    hub: InprocHub,
    channels: Channels,
    layout: KVLayout = TARGET_LAYOUT,
    clock: Clock = monotonic,
    kind: type[HostRegion] = HostRegion,
) -> Receiver:
    region, registry, measured = kind.allocate(layout), CollectorRegistry(), list[tuple[int, float]]()
    ports = make_ports(side.transports, region, registry, hub=hub)
    options: dict[str, Any] = {"wants_digests": True} | side.options
    links = Links(
        ports,
        LinkIdentity("decode-0", side.fingerprint, layout),
        side.secret,
        channel=channels.to,
        metrics=LinkMetrics(registry),
        on_measured=lambda size, seconds: measured.append((size, seconds)),
        clock=clock,
        **options,
    )
    return Receiver(region, ports, links, registry, measured)


@asynccontextmanager
async def rig(
    sender: Side = Side(),
    receiver: Side = Side(),
    layout: KVLayout = TARGET_LAYOUT,
    clock: Clock = monotonic,
    receiver_region: type[HostRegion] = HostRegion,
) -> AsyncIterator[Rig]:
    hub, channels = InprocHub(), Channels()
    sending, receiving = (
        make_sender(sender, hub),
        make_receiver(receiver, hub, channels, layout, clock, receiver_region),
    )
    await sending.start()
    try:
        yield Rig(sending, receiving, channels, hub)
    finally:
        await receiving.links.close()
        await channels.close()
        await sending.stop()
        for worker in (sending, receiving):
            await worker.ports.close()
            worker.region.close()
