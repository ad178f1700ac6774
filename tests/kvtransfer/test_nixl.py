"""NIXL for real: in one process, then between two that are killed and stopped at the worst moment."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from typing import Any

import nixl_child
import pytest
import transfer_child
from prometheus_client import CollectorRegistry
from test_two_processes import child, heard, kill
from transfer_child import LARGE, SEED
from transfer_rig import (
    REQUEST,
    SOURCE_LAYOUT,
    TARGET_LAYOUT,
    Pair,
    StagedRegion,
    fill_random,
    ids,
    is_mapped,
    open_fds,
    pair,
    slices,
    transfer_threads,
)

from baton.errors import TransferError
from baton.ids import RequestId
from kvtransfer.control import Address
from kvtransfer.interface import Connection, Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.nixl.driver import Driver
from kvtransfer.nixl.package import installed, library
from kvtransfer.nixl.receiver import NixlReceiver
from kvtransfer.nixl.sender import NixlSender
from kvtransfer.nixl.wire import Kind
from kvtransfer.port import Place
from kvtransfer.region import HostRegion
from kvtransfer.registry import Ports, make_ports

pytestmark = pytest.mark.skipif(installed() is None, reason="no package of NIXL is installed")

TRANSPORT = "nixl"
BOUND_S = 30
EVERYTHING = ids(*range(LARGE.blocks))


@pytest.fixture(params=["all", "tcp"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What UCX moves bytes by: on one machine it copies out of the other's memory; over tcp both ends have work."""
    monkeypatch.setenv("UCX_TLS", request.param)


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def body() -> None:
        async with asyncio.timeout(2 * BOUND_S):
            await scenario

    asyncio.run(body())


def in_pair(scenario: Callable[[Pair], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def body() -> None:
        async with pair(TRANSPORT, **options) as ends:
            await scenario(ends)

    run(body())


def place(region: HostRegion, secret: bytes | None = None) -> Place:
    return Place(region, TransferMetrics(CollectorRegistry()), secret=secret)


async def receiver_of(region: HostRegion) -> Ports:
    receiver = make_ports([TRANSPORT], region, CollectorRegistry())
    await receiver.start(TRANSPORT)
    return receiver


def sendable(*offers: Offer) -> list[tuple[str, bytes]]:
    return [(offer.transport, offer.descriptor) for offer in offers]


def signalled(process: SpawnProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


async def write_for_ever(connection: Connection) -> None:
    while True:
        await connection.write(0, EVERYTHING, EVERYTHING)


async def gone(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


async def begun(receiver: Any, *or_done: asyncio.Future[None]) -> None:
    while not receiver._reads and not any(future.done() for future in or_done):  # noqa: ASYNC110
        await asyncio.sleep(0)


async def under_way(receiver: Any) -> None:
    """Begun on NIXL's thread too: closing the ticket does not keep it from beginning any more."""
    while not receiver.driver._thread._pipeline._under_way:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


# ---- in one process


def test_both_ends_of_a_worker_share_one_agent_which_the_first_brings_up() -> None:
    async def scenario() -> None:
        regions = [HostRegion.allocate(TARGET_LAYOUT) for _ in range(2)]
        for seed, region in enumerate(regions):
            fill_random(region, seed)
        before = [slices(region).copy() for region in regions]
        a, b = (make_ports([TRANSPORT], region, CollectorRegistry()) for region in regions)
        assert transfer_threads() == []
        await asyncio.gather(a.start(TRANSPORT), b.start(TRANSPORT), a.start(TRANSPORT))
        there, back = RequestId("there"), RequestId("back")
        to_b = await a.connect(there, [b.open(TRANSPORT, there, ids(1, 2))], TARGET_LAYOUT)
        to_a = await b.connect(back, [a.open(TRANSPORT, back, ids(3, 4))], TARGET_LAYOUT)
        assert transfer_threads() == ["kv-nixl", "kv-nixl"]
        await asyncio.gather(to_b.write(1, ids(7, 8), ids(2, 1)), to_a.write(1, ids(9, 10), ids(3, 4)))
        await asyncio.gather(to_b.fence(), to_a.fence())
        assert (slices(regions[1])[1][:, [2, 1]] == before[0][1][:, [7, 8]]).all()
        assert (slices(regions[0])[1][:, [3, 4]] == before[1][1][:, [9, 10]]).all()
        await a.close()
        with pytest.raises(TransferError):
            await to_a.fence()
        await b.close()
        await b.close()
        for region in regions:
            region.close()

    run(scenario())
    assert transfer_threads() == []
    assert not is_mapped()


def test_nothing_is_loaded_before_it_is_used_and_torch_never() -> None:
    script = """
import asyncio, sys
from prometheus_client import CollectorRegistry
from baton.layout import KVLayout
from kvtransfer.nixl.package import installed
from kvtransfer.region import HostRegion
from kvtransfer.registry import make_ports
async def main():
    region = HostRegion.allocate(KVLayout(1, 4, 4, 2, 8, "float32"))
    ports = make_ports(["nixl"], region, CollectorRegistry())
    assert installed() not in sys.modules
    await ports.start("nixl")
    assert installed() in sys.modules and "torch" not in sys.modules
    await ports.close()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_package_changes_nothing_about_our_logging() -> None:
    raise_exceptions = logging.raiseExceptions
    library.cache_clear()
    library()
    assert logging.raiseExceptions == raise_exceptions
    assert logging.getLogger("nixl").handlers == []


def test_memory_that_nixl_cannot_reach_is_refused_at_both_ends() -> None:
    async def scenario() -> None:
        staged, host = StagedRegion.allocate(TARGET_LAYOUT), HostRegion.allocate(TARGET_LAYOUT)
        unreachable = make_ports([TRANSPORT], staged, CollectorRegistry())
        receiver = await receiver_of(host)
        with pytest.raises(TransferError, match="NIXL cannot reach"):
            await unreachable.start(TRANSPORT)
        with pytest.raises(TransferError, match="NIXL cannot reach"):
            await unreachable.connect(REQUEST, [receiver.open(TRANSPORT, REQUEST, ids(1))], TARGET_LAYOUT)
        await unreachable.close()
        await receiver.close()

    run(scenario())
    assert transfer_threads() == []


def test_a_start_that_is_cancelled_leaves_nothing_running() -> None:
    async def scenario() -> None:
        region = HostRegion.allocate(TARGET_LAYOUT)
        driver = Driver(region)
        starting = asyncio.ensure_future(driver.acquire())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await asyncio.to_thread(join_transfer_threads)
        await driver.acquire()
        await driver.release()

    run(scenario())
    assert transfer_threads() == []


def join_transfer_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("kv-"):
            thread.join(BOUND_S)


@pytest.mark.parametrize(("theirs", "ours"), [(b"one", b"other"), (b"one", None), (None, b"other")])
def test_another_cluster_secret_opens_nothing(theirs: bytes | None, ours: bytes | None) -> None:
    async def scenario() -> None:
        regions = [HostRegion.allocate(TARGET_LAYOUT) for _ in range(2)]
        receiver_place, sender_place, friend_place = (
            place(region, secret) for region, secret in zip((*regions, regions[1]), (ours, theirs, ours), strict=True)
        )
        receiver = NixlReceiver(receiver_place, Driver(regions[0]))
        sender = NixlSender(sender_place, Driver(regions[1]))
        friend = NixlSender(friend_place, Driver(regions[1]))
        await receiver.start()
        (offer,) = receiver.open(REQUEST, ids(1))
        with pytest.raises(TransferError, match="cluster secret"):
            await sender.connect(offer, TARGET_LAYOUT)
        connection = await friend.connect(offer, TARGET_LAYOUT)
        await connection.write(0, ids(1), ids(1))
        for end in (sender, friend, receiver):
            await end.close()

    run(scenario())


def test_a_stranger_who_knows_the_ticket_is_refused_by_the_receiver_as_well() -> None:
    async def scenario(ends: Pair) -> None:
        offer = ends.open(ids(1))
        address = Address.unpack(offer.descriptor)
        forged = Address(address.host, address.port, address.ticket, bytes(16))
        with pytest.raises(TransferError, match="cluster secret"):
            await ends.sender.connect(REQUEST, [Offer(TRANSPORT, forged.pack())], TARGET_LAYOUT)
        impostor = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = impostor.sockets[0].getsockname()[1]
        there = Address("127.0.0.1", port, address.ticket, address.secret)
        with pytest.raises(TransferError, match="nobody asked for"):
            await ends.sender.connect(REQUEST, [Offer(TRANSPORT, there.pack())], TARGET_LAYOUT)
        impostor.close()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(4096))
        await reader.read()
        await gone(writer)

    in_pair(scenario)


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n" * 9, b"BNX1" + bytes(12), b"BNX1\0\1\0\0" + b"\xff" * 8, bytes(10**6)]
)
def test_what_is_no_hello_costs_one_connection(said: bytes) -> None:
    async def scenario(ends: Pair) -> None:
        offer = ends.open(ids(1))
        address = Address.unpack(offer.descriptor)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(said)
        writer.write_eof()
        with suppress(ConnectionError):
            assert len(await reader.read()) <= 16
        await gone(writer)
        connection = await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
        await connection.write(0, ids(1), ids(1))

    in_pair(scenario)


@pytest.mark.parametrize(
    ("kind", "body", "layer", "count"),
    [
        (Kind.READY, b"", 0, 0),
        (Kind.READY, bytes(8), 3, 1),
        (Kind.READY, bytes(7), 0, 1),
        (Kind.READY, b"\xff" * 4 + b"\0\0\0\1", 0, 1),
        (Kind.READY, b"\0\0\0\x13\0\0\0\1", 0, 1),
        (Kind.HELLO, bytes(56), 0, 0),
        (Kind.READ, b"", 0, 0),
    ],
)
def test_a_sender_that_makes_no_sense_is_refused(kind: Kind, body: bytes, layer: int, count: int) -> None:
    async def scenario(ends: Pair) -> None:
        connection: Any = await ends.connect(ids(1))
        connection._channel.send(kind, body, layer, count)
        with pytest.raises(TransferError, match="could not understand"):
            await connection.fence()
        assert not slices(ends.target).any()
        again = await ends.connect(ids(1))
        await again.write(0, ids(1), ids(1))

    in_pair(scenario)


def test_more_announced_than_is_allowed_is_refused() -> None:
    async def scenario(ends: Pair) -> None:
        connection: Any = await ends.connect(ids(1))
        for _ in range(1000):
            connection._channel.send(Kind.READY, b"\0\0\0\1\0\0\0\1", 0, 1)
        with pytest.raises(TransferError):
            await connection.fence()

    in_pair(scenario)


def test_a_receiver_that_never_answers_is_given_up() -> None:
    async def scenario(ends: Pair) -> None:
        connection: Any = await ends.connect(ids(1))
        connection._sender.stall_timeout_s = 0.05
        connection._channel.send = lambda *_: None
        await connection.write(0, ids(1), ids(1))
        with pytest.raises(TransferError, match=r"took nothing for 0\.05 s"):
            await connection.fence()
        await connection.close()

    in_pair(scenario)


def test_settling_waits_for_the_reads_of_the_request_and_no_other() -> None:
    async def scenario(ends: Pair) -> None:
        port: Any = ends.receiver._ports[TRANSPORT]
        other = RequestId("other")
        connection = await ends.connect(ids(*range(8)))
        await asyncio.gather(connection.write(0, ids(*range(8)), ids(*range(8))), ends.receiver.settle(other))
        writing = asyncio.ensure_future(connection.write(1, ids(*range(8)), ids(*range(8))))
        await begun(port.receiver, writing)
        ends.receiver.close_ticket(REQUEST)
        await ends.receiver.settle(REQUEST)
        after = slices(ends.target).copy()
        assert not port.receiver._reads
        await asyncio.gather(writing, return_exceptions=True)
        assert (slices(ends.target) == after).all()

    in_pair(scenario)


def test_a_source_that_nixl_does_not_understand_is_refused() -> None:
    async def scenario(ends: Pair) -> None:
        offer = ends.open(ids(1))
        first = await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
        port: Any = ends.sender._ports[TRANSPORT]
        agent = port.sender.driver._thread.agent_made.result()
        source = agent.source
        nonsense = [b"", b"nonsense", bytes(len(source.metadata))]
        for name, metadata in [(source.name, source.metadata[:-9]), *(("another", data) for data in nonsense)]:
            agent.source = replace(source, name=name, metadata=metadata)
            with pytest.raises(TransferError, match="could not read"):
                await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
        agent.source = replace(source, segment=replace(source.segment, address=4096))
        with pytest.raises(TransferError, match="could not read"):
            await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
        await first.write(0, ids(1), ids(1))

    in_pair(scenario)


# ---- between two


@pytest.mark.usefixtures("lanes")
def test_another_process_sends_blocks_byte_for_byte() -> None:
    target = [30, 31, 2, 3, 4, 17, 9]

    async def scenario(region: HostRegion, pipe: Any) -> None:
        receiver = await receiver_of(region)
        pipe.send((sendable(receiver.open(TRANSPORT, REQUEST, ids(*target))), target))
        moved = 2 * SOURCE_LAYOUT.layers * len(target) * SOURCE_LAYOUT.slice_bytes
        assert await heard(pipe) == (TRANSPORT, moved)
        await receiver.close()

    region, source = HostRegion.allocate(TARGET_LAYOUT), HostRegion.allocate(SOURCE_LAYOUT)
    fill_random(source, SEED)
    with child(transfer_child.send_blocks, TRANSPORT) as (process, pipe):
        run(scenario(region, pipe))
        process.join()
        assert process.exitcode == 0
    expected = slices(region).copy() * 0
    expected[:, :, target] = slices(source)[:, :, : len(target)]
    assert (slices(region) == expected).all()


@pytest.mark.usefixtures("lanes")
def test_a_sender_killed_while_it_is_read_from() -> None:
    target = list(range(32))

    async def scenario(region: HostRegion, pipe: Any, process: SpawnProcess) -> None:
        receiver = await receiver_of(region)
        pipe.send((sendable(receiver.open(TRANSPORT, REQUEST, ids(*target))), target))
        assert await heard(pipe) == "writing"
        await asyncio.to_thread(kill, process)
        receiver.close_ticket(REQUEST)
        async with asyncio.timeout(BOUND_S):
            await receiver.settle(REQUEST)
        region.memory[:] = bytes(region.memory.nbytes)  # the blocks are somebody else's now
        source = HostRegion.allocate(LARGE)
        sender = make_ports([TRANSPORT], source, CollectorRegistry())
        offer = receiver.open(TRANSPORT, RequestId("req-2"), ids(1))
        connection = await sender.connect(REQUEST, [offer], LARGE)
        await connection.write(0, ids(1), ids(1))
        await sender.close()
        await receiver.close()
        assert not slices(region).any()

    region = HostRegion.allocate(LARGE)
    before = open_fds()
    with child(transfer_child.send_for_ever, TRANSPORT) as (process, pipe):
        run(scenario(region, pipe, process))
    region.close()
    assert not is_mapped()
    assert transfer_threads() == []
    assert len(open_fds() - before) <= 1, "multiprocessing keeps one of its own"


@pytest.mark.usefixtures("over_tcp")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGCONT])
def test_what_a_stopped_sender_leaves_under_way_keeps_its_blocks_until_it_has_ended(number: int) -> None:
    async def scenario(region: HostRegion, pipe: Any, process: SpawnProcess) -> None:
        receiver = await receiver_of(region)
        pipe.send(sendable(receiver.open(TRANSPORT, REQUEST, EVERYTHING)))
        assert await heard(pipe) == "stopping"
        await under_way(receiver._ports[TRANSPORT].receiver)
        receiver.close_ticket(REQUEST)
        settling = asyncio.ensure_future(receiver.settle(REQUEST))
        await asyncio.wait((settling,), timeout=0.3)
        assert not settling.done(), "a read of a stopped process cannot have ended"
        signalled(process, number)
        async with asyncio.timeout(BOUND_S):
            await settling
        region.memory[:] = bytes(region.memory.nbytes)
        await receiver.close()
        assert not slices(region).any()

    with child(nixl_child.stop_while_read, TRANSPORT) as (process, pipe):
        run(scenario(HostRegion.allocate(LARGE), pipe, process))
    assert transfer_threads() == []


@pytest.mark.usefixtures("lanes")
def test_a_receiver_killed_while_it_reads() -> None:
    async def scenario(pipe: Any, process: SpawnProcess) -> None:
        source = HostRegion.allocate(LARGE)
        sender = make_ports([TRANSPORT], source, CollectorRegistry())
        offers = [Offer(*offer) for offer in await heard(pipe)]  # type: ignore[attr-defined]
        connection = await sender.connect(REQUEST, offers, LARGE)
        await connection.write(0, EVERYTHING, EVERYTHING)
        writing = asyncio.ensure_future(write_for_ever(connection))
        await asyncio.to_thread(kill, process)
        with pytest.raises(TransferError, match="closed the connection"):
            async with asyncio.timeout(BOUND_S):
                await writing
        with pytest.raises(TransferError):
            await connection.fence()
        await connection.close()
        with pytest.raises(TransferError, match="could not be reached"):
            await sender.connect(REQUEST, offers, LARGE)
        await sender.close()

    with child(transfer_child.receive_for_ever, TRANSPORT) as (process, pipe):
        run(scenario(pipe, process))
    assert transfer_threads() == []


def test_a_receiver_that_is_stopped_is_given_up() -> None:
    async def scenario(pipe: Any, process: SpawnProcess) -> None:
        source = HostRegion.allocate(LARGE)
        sender = NixlSender(place(source), Driver(source), stall_timeout_s=0.3)
        offers = [Offer(*offer) for offer in await heard(pipe)]  # type: ignore[attr-defined]
        connection = await sender.connect(offers[0], LARGE)
        signalled(process, signal.SIGSTOP)
        await connection.write(0, EVERYTHING, EVERYTHING)
        with pytest.raises(TransferError, match=r"took nothing for 0\.3 s"):
            await connection.fence()
        await sender.close()

    with child(transfer_child.receive_for_ever, TRANSPORT) as (process, pipe):
        run(scenario(pipe, process))


def test_closing_does_not_wait_for_a_receiver_that_is_stopped() -> None:
    async def scenario(pipe: Any, process: SpawnProcess) -> None:
        source = HostRegion.allocate(LARGE)
        sender = make_ports([TRANSPORT], source, CollectorRegistry())
        offers = [Offer(*offer) for offer in await heard(pipe)]  # type: ignore[attr-defined]
        connection = await sender.connect(REQUEST, offers, LARGE)
        signalled(process, signal.SIGSTOP)
        writing = asyncio.ensure_future(write_for_ever(connection))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(BOUND_S):
            await connection.close()
        with pytest.raises(TransferError):
            await writing
        await sender.close()

    with child(transfer_child.receive_for_ever, TRANSPORT) as (process, pipe):
        run(scenario(pipe, process))
