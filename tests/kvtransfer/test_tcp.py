"""The tcp transport over real sockets: bad peers on either side, and what a link is used for."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, ids, open_fds, slices

from baton.errors import TransferError
from baton.ids import RequestId
from baton.layout import KVLayout
from kvtransfer.interface import Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.region import HostRegion
from kvtransfer.tcp import receiver as receiver_module
from kvtransfer.tcp import sender as sender_module
from kvtransfer.tcp.inlet import PATIENCE, Patience
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.sender import TcpSender
from kvtransfer.tcp.wire import HELLO_BYTES, Address, Header, Kind, layout_digest

LAYOUT = SOURCE_LAYOUT
LARGE = KVLayout(layers=1, blocks=64, block_tokens=64, kv_heads=8, head_dim=128, dtype="float32")
SHORT = Patience(hello_s=0.05, stall_s=0.05, idle_s=0.05, linger_s=0.05)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@asynccontextmanager
async def receiving(patience: Patience = PATIENCE) -> AsyncIterator[TcpReceiver]:
    region = HostRegion.allocate(LAYOUT)
    receiver = TcpReceiver(region, "127.0.0.1", 0, "127.0.0.1", TransferMetrics(CollectorRegistry()), patience)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.close()
        region.close()


@asynccontextmanager
async def sending(layout: KVLayout = LAYOUT, **timeouts: float) -> AsyncIterator[TcpSender]:
    region = HostRegion.allocate(layout)
    sender = TcpSender(region, TransferMetrics(CollectorRegistry()), **timeouts)
    try:
        yield sender
    finally:
        await sender.close()
        region.close()


@asynccontextmanager
async def raw(receiver: TcpReceiver) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Until the receiver hangs up, in whichever way."""
    data = b""
    try:
        while chunk := await reader.read(4096):
            data += chunk
    except ConnectionError:
        pass
    return data


def region_of(receiver: TcpReceiver) -> HostRegion:
    assert isinstance(receiver._region, HostRegion)
    return receiver._region


async def check_serves(receiver: TcpReceiver, sender: TcpSender) -> None:
    (offer,) = receiver.open(RequestId("good"), ids(1))
    connection = await sender.connect(offer, LAYOUT)
    await connection.write(0, ids(1), ids(1))
    await connection.fence()
    await connection.close()


# ---- bad senders


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=1, max_size=2000))
def test_garbage_costs_only_its_connection(data: bytes) -> None:
    async def scenario() -> None:
        async with receiving(SHORT) as receiver, raw(receiver) as (reader, writer):
            writer.write(data)
            await read_to_the_end(reader)
            async with sending() as sender:
                await check_serves(receiver, sender)

    run(scenario())


def test_a_stranger_is_told_why_and_cut() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, raw(receiver) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            writer.write_eof()
            answer = Header.unpack(await read_to_the_end(reader))
            assert answer is not None
            assert answer.kind == Kind.ERROR

    run(scenario())


def test_a_silent_stranger_is_cut() -> None:
    async def scenario() -> None:
        async with receiving(SHORT) as receiver, raw(receiver) as (reader, _):
            assert await read_to_the_end(reader) == b""
            assert not receiver._inflows

    run(scenario())


def test_strangers_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "UNAUTHENTICATED_MAX", 2)

    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)  # its link is authenticated, and does not count
            async with raw(receiver) as one, raw(receiver) as two:
                one[1].write(b"B")
                two[1].write(b"B")
                async with raw(receiver) as (reader, _):
                    assert await read_to_the_end(reader) == b""
                await check_serves(receiver, sender)

    run(scenario())


def test_half_a_frame_and_gone() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(3, 4))
            address = Address.unpack(offer.descriptor)
            async with raw(receiver) as (reader, writer):
                writer.write(Header(Kind.HELLO, address.ticket).pack() + address.secret + layout_digest(LAYOUT))
                assert Header.unpack(await reader.readexactly(Header.FORMAT.size)) == Header(Kind.ACK, address.ticket)
                (inflow,) = receiver._inflows
                writer.write(Header(Kind.SLICES, address.ticket, 0, 2).pack() + bytes([0, 0, 0, 3, 0, 0, 0, 4]))
                writer.write(b"\xaa" * 700)
                await writer.drain()
            await inflow.ended.wait()
            others = [block for block in range(LAYOUT.blocks) if block not in (3, 4)]
            assert not slices(region_of(receiver))[:, :, others].any()
            assert slices(region_of(receiver))[0, 0, 3].all()
            await check_serves(receiver, sender)

    run(scenario())


def test_a_sender_that_stalls_within_a_frame_is_cut() -> None:
    async def scenario() -> None:
        async with receiving(SHORT) as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(3))
            connection = await sender.connect(offer, LAYOUT)
            await connection._link.send([Header(Kind.SLICES, 1, 0, 1).pack()])
            (inflow,) = receiver._inflows
            await inflow.ended.wait()
            with pytest.raises(TransferError, match="closed the connection"):
                await connection.fence()

    run(scenario())


class Tap:
    """A transport that shows only whether it reads."""

    reads = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


def test_nothing_is_taken_from_who_does_not_read_its_answers() -> None:
    async def scenario() -> None:
        async with receiving() as receiver:
            inflow, tap = receiver_module._Inflow(receiver), Tap()
            inflow._transport = tap  # type: ignore[assignment]
            inflow.pause_writing()
            assert not tap.reads
            inflow.resume_writing()
            assert tap.reads

    run(scenario())


# ---- bad receivers


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
        yield Offer("tcp", Address("127.0.0.1", port, 1, bytes(16)).pack())
    finally:
        over.set()
        server.close()
        await asyncio.gather(*tasks)
        await server.wait_closed()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
    del reader, writer
    await over.wait()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
    del reader, writer, over


async def stop_reading_after_hello(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event
) -> None:
    await reader.readexactly(Header.FORMAT.size + HELLO_BYTES)
    transport = writer.transport
    assert isinstance(transport, asyncio.ReadTransport)
    transport.pause_reading()
    writer.write(Header(Kind.ACK, 1, count=1).pack())
    await over.wait()


def test_nobody_listens() -> None:
    async def scenario() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            offer = Offer("tcp", Address("127.0.0.1", unused.getsockname()[1], 1, bytes(16)).pack())
            async with sending() as sender:
                with pytest.raises(TransferError, match="could not be reached: Connection refused"):
                    await sender.connect(offer, LAYOUT)

    run(scenario())


@pytest.mark.parametrize("host", ["a..b", "a\0b", "x" * 300])
def test_a_host_that_is_none(host: str) -> None:
    async def scenario() -> None:
        async with sending() as sender:
            with pytest.raises(TransferError, match="could not be resolved"):
                await sender.connect(Offer("tcp", Address(host, 1, 1, bytes(16)).pack()), LAYOUT)

    run(scenario())


def test_a_receiver_that_never_answers() -> None:
    async def scenario() -> None:
        async with impostor(say_nothing) as offer, sending(connect_timeout_s=0.05) as sender:
            with pytest.raises(TransferError, match=r"did not answer within 0\.05 s"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", Header(Kind.ACK, 1, count=9).pack()])
def test_a_receiver_that_answers_nonsense(answer: bytes) -> None:
    async def behave(_: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
        writer.write(answer)
        await over.wait()

    async def scenario() -> None:
        async with impostor(behave) as offer, sending() as sender:
            with pytest.raises(TransferError, match="nobody asked for"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_a_receiver_that_hangs_up() -> None:
    async def scenario() -> None:
        async with impostor(hang_up) as offer, sending() as sender:
            with pytest.raises(TransferError, match="closed the connection"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_a_receiver_that_takes_nothing_more() -> None:
    async def scenario() -> None:
        everything = ids(*range(LARGE.blocks))
        async with impostor(stop_reading_after_hello) as offer, sending(LARGE, stall_timeout_s=0.1) as sender:
            connection = await sender.connect(offer, LARGE)
            with pytest.raises(TransferError, match=r"took nothing for 0\.1 s"):
                await connection.write(0, everything, everything)

    run(scenario())


def test_closing_ends_a_write_that_waits_for_the_receiver() -> None:
    async def scenario() -> None:
        everything = ids(*range(LARGE.blocks))
        async with impostor(stop_reading_after_hello) as offer, sending(LARGE) as sender:
            connection = await sender.connect(offer, LARGE)
            writing = asyncio.ensure_future(connection.write(0, everything, everything))
            for _ in range(1000):  # turns of the loop, until no buffer takes more
                await asyncio.sleep(0)
            assert not writing.done()
            await asyncio.wait_for(connection.close(), 5)
            with pytest.raises(TransferError, match="interrupted"):
                await writing

    run(scenario())


def test_a_receiver_that_never_acknowledges() -> None:
    async def scenario() -> None:
        async with impostor(stop_reading_after_hello) as offer, sending(stall_timeout_s=0.1) as sender:
            connection = await sender.connect(offer, LAYOUT)
            await connection.write(0, ids(1), ids(1))
            with pytest.raises(TransferError, match=r"took nothing for 0\.1 s"):
                await connection.fence()

    run(scenario())


# ---- links


def test_a_write_that_the_socket_takes_at_once_still_gives_the_loop_its_turn() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            connection = await sender.connect(offer, LAYOUT)
            writing = asyncio.ensure_future(connection.write(0, ids(1), ids(1)))
            await asyncio.sleep(0)
            assert not writing.done()
            await writing

    run(scenario())


def test_a_link_serves_one_ticket_after_the_other() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)
            first = set(receiver._inflows)
            await check_serves(receiver, sender)
            assert set(receiver._inflows) == first
            assert len(first) == 1

    run(scenario())


def test_a_link_with_something_unacknowledged_is_not_used_again() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            connection = await sender.connect(offer, LAYOUT)
            (inflow,) = receiver._inflows
            await connection.write(0, ids(1), ids(1))
            await connection.close()
            await inflow.ended.wait()
            await check_serves(receiver, sender)

    run(scenario())


def test_a_link_that_the_receiver_dropped_is_made_anew() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)
            (inflow,) = receiver._inflows
            inflow.cut()
            await inflow.ended.wait()
            await check_serves(receiver, sender)

    run(scenario())


def test_a_refused_ticket_costs_no_more_than_its_own_link() -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            good = [receiver.open(RequestId(f"req-{i}"), ids(i))[0] for i in range(3)]
            for connection in [await sender.connect(offer, LAYOUT) for offer in good]:
                await connection.close()
            receiver.close_ticket(RequestId("req-1"))
            with pytest.raises(TransferError, match="no open ticket"):
                await sender.connect(good[1], LAYOUT)
            assert sum(len(idle) for idle in sender._idle.values()) == 2

    run(scenario())


def test_idle_links_are_kept_only_so_long_and_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "IDLE_LINKS_MAX", 2)

    async def scenario() -> None:
        async with receiving() as receiver, sending(idle_s=0.01) as sender:
            offers = [receiver.open(RequestId(f"req-{i}"), ids(i))[0] for i in range(4)]
            used = [await sender.connect(offer, LAYOUT) for offer in offers]
            inflows = tuple(receiver._inflows)
            before = open_fds()
            for connection in used:
                await connection.close()
            assert sum(len(idle) for idle in sender._idle.values()) == 2
            for inflow in inflows:
                await inflow.ended.wait()
            assert sender._idle == {}
            assert len(open_fds()) == len(before) - 8

    run(scenario())
