"""The tcp transport over real sockets: bad peers on either side, and what a link is used for."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from tcp_rig import (
    IMPOSTORS_TICKET,
    LARGE,
    LAYOUT,
    LOOPS,
    SECRET,
    Run,
    check_serves,
    greet_by_hand,
    impostor,
    raw,
    read_challenge,
    read_to_the_end,
    receiving,
    region_of,
    runner,
    sending,
    unused_port,
    welcome,
)
from transfer_rig import REQUEST, ids, open_fds, slices

from baton.errors import TransferError
from baton.ids import RequestId
from kvtransfer.control import Address, Fault
from kvtransfer.interface import Offer
from kvtransfer.tcp import link as link_module
from kvtransfer.tcp import listener as listener_module
from kvtransfer.tcp import receiver as receiver_module
from kvtransfer.tcp import sender as sender_module
from kvtransfer.tcp.inflow import SocketInflow
from kvtransfer.tcp.listener import Listener
from kvtransfer.tcp.patience import Patience
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.wire import Header, Kind

SHORT = Patience(hello_s=0.05, stall_s=0.05, idle_s=0.05, linger_s=0.05)


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return runner(request.param)


# ---- bad senders


def test_a_stranger_is_told_why_and_cut(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, raw(receiver) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            writer.write_eof()
            await read_challenge(reader)
            assert await read_to_the_end(reader) == Header(Kind.ERROR, 0, count=Fault.MALFORMED).pack()

    run(scenario())


def test_a_silent_stranger_is_cut(run: Run) -> None:
    async def scenario() -> None:
        async with receiving(SHORT) as receiver, raw(receiver) as (reader, _):
            await read_challenge(reader)
            assert await read_to_the_end(reader) == b""
            assert not receiver._inflows

    run(scenario())


def test_of_many_strangers_the_oldest_is_cut(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they keep nobody out who proves a ticket."""
    monkeypatch.setattr(receiver_module, "UNAUTHENTICATED_MAX", 2)

    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)  # its link is authenticated, and does not count
            authenticated = set(receiver._inflows)
            async with raw(receiver) as one, raw(receiver) as two, raw(receiver) as three:
                await read_challenge(one[0])
                assert await read_to_the_end(one[0]) == b""
                await read_challenge(two[0])
                await read_challenge(three[0])
                assert len(receiver._inflows) == 3
                assert authenticated < set(receiver._inflows)
                await check_serves(receiver, sender)

    run(scenario())


def test_connections_are_only_so_many(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "CONNECTIONS_MAX", 2)

    async def scenario() -> None:
        async with receiving() as receiver, raw(receiver) as one, raw(receiver) as two, raw(receiver) as three:
            await read_challenge(one[0])
            await read_challenge(two[0])
            assert await read_to_the_end(three[0]) == b""

    run(scenario())


def test_a_link_is_not_kept_until_its_count_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "COUNT_MAX", 3)

    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)
            assert [len(idle) for idle in sender._idle.values()] == [1]
            await check_serves(receiver, sender)
            assert not sender._idle

    run(scenario())


def test_half_a_frame_and_gone(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(3, 4))
            async with raw(receiver) as (reader, writer):
                address = await greet_by_hand(offer, reader, writer)
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


def test_a_sender_that_stalls_within_a_frame_is_cut(run: Run) -> None:
    async def scenario() -> None:
        async with receiving(Patience(stall_s=0.05, linger_s=0.05)) as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(3))
            connection = await sender.connect(offer, LAYOUT)
            await connection._link.send([Header(Kind.SLICES, 1, 0, 1).pack()])
            (inflow,) = receiver._inflows
            await inflow.ended.wait()
            with pytest.raises(TransferError, match="closed the connection"):
                await connection.fence()

    run(scenario())


def test_nothing_is_taken_from_who_does_not_read_its_answers(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, raw(receiver) as (reader, writer):
            (offer,) = receiver.open(REQUEST, ids(1))
            address = await greet_by_hand(offer, reader, writer)
            (inflow,) = receiver._inflows
            assert isinstance(inflow, SocketInflow)
            cast(asyncio.Transport, writer.transport).pause_reading()
            inflow._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            fences = 2**15
            writer.write(b"".join(Header(Kind.FENCE, address.ticket, count=i).pack() for i in range(fences)))
            while not inflow._unsent:  # noqa: ASYNC110  (there is no event)
                await asyncio.sleep(0)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert 0 < len(inflow._unsent) <= Header.FORMAT.size
            cast(asyncio.Transport, writer.transport).resume_reading()
            answers = await reader.readexactly(fences * Header.FORMAT.size)
            assert answers[-Header.FORMAT.size :] == Header(Kind.ACK, address.ticket, count=fences - 1).pack()

    run(scenario())


def test_a_closed_ticket_stops_what_is_half_received(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, raw(receiver) as (reader, writer):
            (offer,) = receiver.open(REQUEST, ids(3, 4))
            address = await greet_by_hand(offer, reader, writer)
            head = Header(Kind.SLICES, address.ticket, 0, 2).pack() + bytes([0, 0, 0, 3, 0, 0, 0, 4])
            writer.write(head + b"\xaa" * 700)
            while not slices(region_of(receiver))[0, 1, 3, 700 - 2 * LAYOUT.slice_bytes - 1]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            receiver.close_ticket(REQUEST)
            await receiver.settle(REQUEST)
            settled = bytes(region_of(receiver).memory)
            writer.write(b"\xbb" * (4 * LAYOUT.slice_bytes - 700))
            answer = Header.unpack(await reader.readexactly(Header.FORMAT.size))
            assert answer == Header(Kind.ERROR, address.ticket, count=Fault.TICKET_CLOSED)
            assert bytes(region_of(receiver).memory) == settled

    run(scenario())


def test_only_the_given_address_listens(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver:
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.2", receiver.port)

    run(scenario())


def test_a_port_that_is_taken_is_told(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver:
            other = TcpReceiver(replace(receiver._place, port=receiver.port))
            with pytest.raises(TransferError, match="Address already in use"):
                await other.start()

    run(scenario())


def test_descriptors_that_ran_out_cost_a_pause_and_no_listener(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "PAUSE_S", 0.01)

    class Exhausted(socket.socket):
        """A listening socket to which the system refuses a descriptor, twice."""

        refusals = 2

        def accept(self) -> tuple[socket.socket, Any]:
            if self.refusals > 0:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def scenario() -> None:
        accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
        listening = Exhausted()
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        listener = Listener(listening, accepted.put_nowait)
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        (await accepted.get()).close()
        assert listening.refusals == 0
        writer.close()
        listener.close()
        listener.close()

    run(scenario())


# ---- proofs


@pytest.mark.parametrize(
    ("theirs", "mine"), [(SECRET, b"another cluster's"), (SECRET, None), (None, SECRET)], ids=["other", "none", "any"]
)
def test_who_has_another_cluster_secret_writes_nothing(run: Run, theirs: bytes | None, mine: bytes | None) -> None:
    async def scenario() -> None:
        async with receiving(secret=theirs) as receiver, sending(secret=mine) as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            with pytest.raises(TransferError, match="another cluster secret"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_without_a_cluster_secret_the_ticket_is_enough(run: Run) -> None:
    async def scenario() -> None:
        async with receiving(secret=None) as receiver, sending(secret=None) as sender:
            await check_serves(receiver, sender)

    run(scenario())


def test_what_was_overheard_is_good_for_nothing(run: Run) -> None:
    """A relay hears a whole connection: no secret is in it, and what it repeats is refused."""

    async def scenario() -> None:
        async with receiving(Patience(linger_s=0.05)) as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            address = Address.unpack(offer.descriptor)
            async with relay(receiver.port) as (port, heard):
                through = replace(address, port=port).pack()
                connection = await sender.connect(Offer("tcp", through), LAYOUT)
                await connection.write(0, ids(1), ids(1))
                await connection.fence()
                await connection.close()
                await sender.close()
            assert len(heard) > 2 * LAYOUT.slice_bytes
            assert address.secret not in heard
            assert SECRET not in heard
            async with raw(receiver) as (reader, writer):
                await read_challenge(reader)
                writer.write(heard)
                assert await read_to_the_end(reader) == Header(Kind.ERROR, 0, count=Fault.UNAUTHORIZED).pack()

    run(scenario())


@asynccontextmanager
async def relay(port: int) -> AsyncIterator[tuple[int, bytearray]]:
    """Passes one connection on to the port; yields its own, and what went to the receiver."""
    heard, ended = bytearray(), asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray) -> None:
        try:
            while data := await reader.read(65536):
                record += data
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, on[1], heard), pump(on[0], writer, bytearray()))
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heard
        await ended.wait()
    finally:
        server.close()
        await server.wait_closed()


# ---- bad receivers


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
    del reader, writer
    await over.wait()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
    del reader, writer, over


async def stop_reading_after_hello(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event
) -> None:
    await welcome(reader, writer)
    cast(asyncio.Transport, writer.transport).pause_reading()
    await over.wait()


def test_nobody_listens(run: Run) -> None:
    async def scenario() -> None:
        with unused_port() as unused:
            offer = Offer("tcp", Address("127.0.0.1", unused.getsockname()[1], 1, IMPOSTORS_TICKET).pack())
            async with sending() as sender:
                with pytest.raises(TransferError, match="could not be reached: Connection refused"):
                    await sender.connect(offer, LAYOUT)

    run(scenario())


@pytest.mark.parametrize("host", ["a..b", "a\0b", "x" * 300])
def test_a_host_that_is_none(run: Run, host: str) -> None:
    async def scenario() -> None:
        async with sending() as sender:
            with pytest.raises(TransferError, match="could not be resolved"):
                await sender.connect(Offer("tcp", Address(host, 1, 1, IMPOSTORS_TICKET).pack()), LAYOUT)

    run(scenario())


def test_a_receiver_that_never_answers(run: Run) -> None:
    async def scenario() -> None:
        async with impostor(say_nothing) as offer, sending(connect_timeout_s=0.05) as sender:
            with pytest.raises(TransferError, match=r"did not answer within 0\.05 s"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", Header(Kind.ACK, 1, count=9).pack()])
def test_a_receiver_that_answers_nonsense(run: Run, answer: bytes) -> None:
    async def behave(_: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
        writer.write(answer)
        await over.wait()

    async def scenario() -> None:
        async with impostor(behave) as offer, sending() as sender:
            with pytest.raises(TransferError, match="nobody asked for"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_a_receiver_without_the_cluster_secret_gets_nothing(run: Run) -> None:
    """Though it knows the ticket, which it may have read on the way."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
        await welcome(reader, writer, b"a guess")
        assert not await read_to_the_end(reader)
        await over.wait()

    async def scenario() -> None:
        async with impostor(behave) as offer, sending() as sender:
            with pytest.raises(TransferError, match="did not prove that it belongs"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_a_receiver_that_hangs_up(run: Run) -> None:
    async def scenario() -> None:
        async with impostor(hang_up) as offer, sending() as sender:
            with pytest.raises(TransferError, match="closed the connection"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_a_receiver_that_takes_nothing_more(run: Run) -> None:
    async def scenario() -> None:
        everything = ids(*range(LARGE.blocks))
        async with impostor(stop_reading_after_hello) as offer, sending(LARGE, stall_timeout_s=0.1) as sender:
            connection = await sender.connect(offer, LARGE)
            with pytest.raises(TransferError, match=r"took nothing for 0\.1 s"):
                await connection.write(0, everything, everything)

    run(scenario())


def test_closing_ends_a_write_that_waits_for_the_receiver(run: Run) -> None:
    async def scenario() -> None:
        everything = ids(*range(LARGE.blocks))
        async with impostor(stop_reading_after_hello) as offer, sending(LARGE) as sender:
            connection = await sender.connect(offer, LARGE)
            writing = asyncio.ensure_future(connection.write(0, everything, everything))
            for _ in range(1000):  # turns of the loop, until no buffer takes more
                await asyncio.sleep(0)
            assert not writing.done()
            await asyncio.wait_for(connection.close(), 30)
            with pytest.raises(TransferError, match="interrupted"):
                await writing

    run(scenario())


def test_a_receiver_that_never_acknowledges(run: Run) -> None:
    async def scenario() -> None:
        async with impostor(stop_reading_after_hello) as offer, sending(stall_timeout_s=0.1) as sender:
            connection = await sender.connect(offer, LAYOUT)
            await connection.write(0, ids(1), ids(1))
            with pytest.raises(TransferError, match=r"took nothing for 0\.1 s"):
                await connection.fence()

    run(scenario())


# ---- links


def test_a_write_that_the_socket_takes_at_once_still_gives_the_loop_its_turn(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            connection = await sender.connect(offer, LAYOUT)
            writing = asyncio.ensure_future(connection.write(0, ids(1), ids(1)))
            await asyncio.sleep(0)
            assert not writing.done()
            await writing

    run(scenario())


def test_a_link_serves_one_ticket_after_the_other(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)
            first = set(receiver._inflows)
            await check_serves(receiver, sender)
            assert set(receiver._inflows) == first
            assert len(first) == 1

    run(scenario())


def test_a_link_with_something_unacknowledged_is_not_used_again(run: Run) -> None:
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


def test_a_link_that_the_receiver_dropped_is_made_anew(run: Run) -> None:
    async def scenario() -> None:
        async with receiving() as receiver, sending() as sender:
            await check_serves(receiver, sender)
            (inflow,) = receiver._inflows
            inflow.cut()
            await inflow.ended.wait()
            await check_serves(receiver, sender)

    run(scenario())


def test_a_refused_ticket_costs_no_more_than_its_own_link(run: Run) -> None:
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


def test_idle_links_are_kept_only_so_long_and_so_many(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "IDLE_LINKS_MAX", 2)

    async def scenario() -> None:
        async with receiving() as receiver, sending(idle_s=0.5) as sender:
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
            assert len(open_fds()) <= len(before) - 8

    run(scenario())
