"""Ends of the tcp transport, whole or by hand."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry
from transfer_rig import SOURCE_LAYOUT, ids

from baton.ids import RequestId
from baton.layout import KVLayout
from kvtransfer.control import Address, layout_digest
from kvtransfer.interface import Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.port import Place
from kvtransfer.region import HostRegion
from kvtransfer.tcp.patience import PATIENCE, Patience
from kvtransfer.tcp.proof import Greeting, Role, ticket_key
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.sender import TcpSender
from kvtransfer.tcp.wire import Header, Hello, Kind
from kvtransfer.tls import TlsFiles

LAYOUT = SOURCE_LAYOUT
LARGE = KVLayout(layers=1, blocks=64, block_tokens=64, kv_heads=8, head_dim=128, dtype="float32")
SECRET = b"the cluster's secret, which is long"
IMPOSTORS_TICKET = bytes(16)

Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS = {"asyncio": asyncio.DefaultEventLoopPolicy, "uvloop": uvloop.EventLoopPolicy}


def runner(loop: str) -> Run:
    """Runs a scenario on a fresh loop of that kind, for a minute at most."""

    async def bounded(scenario: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(60):
            await scenario

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        asyncio.set_event_loop_policy(LOOPS[loop]())
        try:
            asyncio.run(bounded(scenario))
        finally:
            asyncio.set_event_loop_policy(None)

    return run


def place(region: HostRegion, secret: bytes | None = SECRET, tls: TlsFiles | None = None) -> Place:
    return Place(region, TransferMetrics(CollectorRegistry()), secret=secret, tls=tls)


@asynccontextmanager
async def receiving(
    patience: Patience = PATIENCE,
    layout: KVLayout = LAYOUT,
    secret: bytes | None = SECRET,
    tls: TlsFiles | None = None,
) -> AsyncIterator[TcpReceiver]:
    region = HostRegion.allocate(layout)
    receiver = TcpReceiver(place(region, secret, tls), patience)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.close()
        region.close()


@asynccontextmanager
async def sending(
    layout: KVLayout = LAYOUT, secret: bytes | None = SECRET, tls: TlsFiles | None = None, **timeouts: float
) -> AsyncIterator[TcpSender]:
    region = HostRegion.allocate(layout)
    sender = TcpSender(place(region, secret, tls), **timeouts)
    try:
        yield sender
    finally:
        await sender.close()
        region.close()


@asynccontextmanager
async def raw(receiver: TcpReceiver) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stranger's connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def read_header(reader: asyncio.StreamReader) -> Header:
    header = Header.unpack(await reader.readexactly(Header.FORMAT.size))
    assert header is not None
    return header


async def read_challenge(reader: asyncio.StreamReader) -> bytes:
    assert (await read_header(reader)).kind == Kind.CHALLENGE
    return await reader.readexactly(16)


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Until the receiver hangs up, in whichever way."""
    data = b""
    try:
        while chunk := await reader.read(4096):
            data += chunk
    except ConnectionError:
        pass
    return data


def hello_frame(address: Address, challenge: bytes, layout: KVLayout = LAYOUT, secret: bytes | None = SECRET) -> bytes:
    """The first HELLO of a connection."""
    greeting = Greeting(challenge, bytes(16), 1, address.ticket, layout_digest(layout))
    proof = greeting.proof(Role.SENDER, ticket_key(secret, address.secret))
    hello = Hello(greeting.nonce, greeting.layout_digest, proof)
    return Header(Kind.HELLO, address.ticket, count=1).pack() + hello.pack()


async def greet_by_hand(offer: Offer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Address:
    address = Address.unpack(offer.descriptor)
    writer.write(hello_frame(address, await read_challenge(reader)))
    assert (await read_header(reader)).kind == Kind.WELCOME
    await reader.readexactly(32)
    return address


def region_of(receiver: TcpReceiver) -> HostRegion:
    region = receiver._place.region
    assert isinstance(region, HostRegion)
    return region


async def check_serves(receiver: TcpReceiver, sender: TcpSender) -> None:
    """A block written by `sender` arrives."""
    (offer,) = receiver.open(RequestId("good"), ids(1))
    connection = await sender.connect(offer, region_of(receiver).layout)
    source = connection._source
    assert isinstance(source, HostRegion)
    source.writable(0, 0, 1, 1)[:8] = b"presence"
    await connection.write(0, ids(1), ids(1))
    await connection.fence()
    await connection.close()
    landed = region_of(receiver).writable(0, 0, 1, 1)
    assert landed[:8] == b"presence"
    landed[:8] = bytes(8)


def open_sockets() -> set[str]:
    """This process's, without what loops and the run itself keep open."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return {target for link in links if os.path.islink(link) and (target := os.readlink(link)).startswith("socket:")}


# ---- impostors

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Event], Awaitable[None]]
"""What an impostor does with a connection; the event is set when the test is over."""


@asynccontextmanager
async def impostor(behave: Behaviour) -> AsyncIterator[Offer]:
    """A listener that is no receiver, and an offer that leads there."""
    over = asyncio.Event()
    tasks: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            await behave(reader, writer, over)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Offer("tcp", Address("127.0.0.1", port, 1, IMPOSTORS_TICKET).pack())
    finally:
        over.set()
        server.close()
        await asyncio.gather(*tasks)
        await server.wait_closed()


async def welcome(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cluster_secret: bytes | None = SECRET
) -> None:
    """As a receiver would that has that secret."""
    challenge = bytes(16)
    writer.write(Header(Kind.CHALLENGE, 0).pack() + challenge)
    header = await read_header(reader)
    hello = Hello.unpack(await reader.readexactly(Hello.FORMAT.size))
    greeting = Greeting(challenge, hello.nonce, header.count, header.ticket, hello.layout_digest)
    proof = greeting.proof(Role.RECEIVER, ticket_key(cluster_secret, IMPOSTORS_TICKET))
    writer.write(Header(Kind.WELCOME, header.ticket, count=header.count).pack() + proof)


def unused_port() -> socket.socket:
    """Bound, and nobody listens."""
    unused = socket.socket()
    unused.bind(("127.0.0.1", 0))
    return unused
