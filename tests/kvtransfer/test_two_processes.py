"""Between real processes, which are killed and stopped at the worst moment."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess

import pytest
import transfer_child
from prometheus_client import CollectorRegistry
from transfer_child import LARGE, SEED, SMALL
from transfer_rig import (
    REQUEST,
    SOURCE_LAYOUT,
    TARGET_LAYOUT,
    fill_random,
    ids,
    is_mapped,
    open_fds,
    slices,
    transfer_threads,
)

from baton.errors import TransferError
from baton.ids import RequestId
from kvtransfer.interface import Connection, Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.port import Place
from kvtransfer.region import HostRegion
from kvtransfer.registry import Ports, make_ports
from kvtransfer.tcp.sender import TcpSender

SPAWN = multiprocessing.get_context("spawn")
UCX = pytest.param("ucx", marks=pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed"))
both = pytest.mark.parametrize("transport", ["shm", "tcp", UCX])


@contextmanager
def child(task: Callable[[Pipe, str], None], transport: str) -> Iterator[tuple[SpawnProcess, Pipe]]:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=task, args=(there, transport))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()


async def heard(pipe: Pipe) -> object:
    """What the other process says next."""
    return await asyncio.to_thread(pipe.recv)


def kill(process: SpawnProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def receiver_of(transport: str, region: HostRegion) -> Ports:
    return make_ports([transport], region, CollectorRegistry())


def sendable(*offers: Offer) -> list[tuple[str, bytes]]:
    return [(offer.transport, offer.descriptor) for offer in offers]


@both
def test_another_process_writes_blocks_byte_for_byte(transport: str) -> None:
    target = [30, 31, 2, 3, 4, 17, 9]

    async def scenario(region: HostRegion, pipe: Pipe) -> None:
        receiver = receiver_of(transport, region)
        await receiver.start(transport)
        pipe.send((sendable(receiver.open(transport, REQUEST, ids(*target))), target))
        moved = 2 * SOURCE_LAYOUT.layers * len(target) * SOURCE_LAYOUT.slice_bytes
        assert await heard(pipe) == (transport, moved)
        await receiver.close()

    region, source = HostRegion.allocate(TARGET_LAYOUT), HostRegion.allocate(SOURCE_LAYOUT)
    fill_random(source, SEED)
    with child(transfer_child.send_blocks, transport) as (process, pipe):
        asyncio.run(asyncio.wait_for(scenario(region, pipe), 60))
        process.join()
        assert process.exitcode == 0
    expected = slices(region).copy() * 0
    expected[:, :, target] = slices(source)[:, :, : len(target)]
    assert (slices(region) == expected).all()
    region.close()
    source.close()


@both
def test_a_sender_killed_while_it_writes(transport: str) -> None:
    target = list(range(32))

    async def scenario(region: HostRegion, pipe: Pipe, process: SpawnProcess) -> None:
        receiver = receiver_of(transport, region)
        await receiver.start(transport)
        pipe.send((sendable(receiver.open(transport, REQUEST, ids(*target))), target))
        assert await heard(pipe) == "writing"
        await asyncio.to_thread(kill, process)
        receiver.close_ticket(REQUEST)
        settled = slices(region).copy()
        await check_serves_others(receiver)
        changed = [block for block in range(LARGE.blocks) if block != 1]
        assert (slices(region)[:, :, changed] == settled[:, :, changed]).all()
        assert not settled[:, :, 32:].any()
        await receiver.close()

    async def check_serves_others(receiver: Ports) -> None:
        source = HostRegion.allocate(LARGE)
        sender = make_ports([transport], source, CollectorRegistry())
        connection = await sender.connect(REQUEST, [receiver.open(transport, RequestId("req-2"), ids(1))], LARGE)
        await connection.write(0, ids(1), ids(1))
        await connection.fence()
        await sender.close()
        source.close()

    region = HostRegion.allocate(LARGE)
    with child(transfer_child.send_for_ever, transport) as (process, pipe):
        asyncio.run(asyncio.wait_for(scenario(region, pipe, process), 60))
    assert not slices(region)[0, :, 1].any()
    region.close()
    assert not is_mapped()


@both
def test_a_receiver_killed_while_it_is_written_to(transport: str) -> None:
    async def scenario(pipe: Pipe, process: SpawnProcess) -> None:
        source = HostRegion.allocate(LARGE)
        sender = make_ports([transport], source, CollectorRegistry())
        offers = [Offer(*offer) for offer in await heard(pipe)]  # type: ignore[attr-defined]
        connection = await sender.connect(REQUEST, offers, LARGE)
        writing = asyncio.ensure_future(write_for_ever(connection))
        await asyncio.to_thread(kill, process)
        with pytest.raises(TransferError, match=r"process is gone|closed the connection"):
            await writing
        with pytest.raises(TransferError):
            await connection.fence()
        await connection.close()
        with pytest.raises(TransferError):
            await sender.connect(REQUEST, offers, LARGE)
        source.close()
        del writing, connection  # their errors' tracebacks hold views
        assert not is_mapped()  # nothing holds the dead one's memory
        await sender.close()

    async def write_for_ever(connection: Connection) -> None:
        everything = ids(*range(LARGE.blocks))
        while True:
            await connection.write(0, everything, everything)

    with child(transfer_child.receive_for_ever, transport) as (process, pipe):
        before = open_fds()
        asyncio.run(asyncio.wait_for(scenario(pipe, process), 60))
        assert open_fds() <= before
    assert transfer_threads() == []


def test_a_receiver_that_is_stopped_is_given_up() -> None:
    async def scenario(pipe: Pipe, process: SpawnProcess) -> None:
        source = HostRegion.allocate(LARGE)
        sender = TcpSender(Place(source, TransferMetrics(CollectorRegistry())), stall_timeout_s=0.3)
        offers = [Offer(*offer) for offer in await heard(pipe)]  # type: ignore[attr-defined]
        connection = await sender.connect(offers[0], LARGE)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        everything = ids(*range(LARGE.blocks))
        with pytest.raises(TransferError, match=r"took nothing for 0\.3 s"):
            await connection.write(0, everything, everything)
        await sender.close()
        source.close()

    with child(transfer_child.receive_for_ever, "tcp") as (process, pipe):
        asyncio.run(asyncio.wait_for(scenario(pipe, process), 60))


@pytest.mark.parametrize("end", ["goes on", "is killed"])
def test_a_writer_stopped_in_a_copy_is_waited_for_until_it(end: str) -> None:
    target = [4, 9]

    async def scenario(region: HostRegion, pipe: Pipe, process: SpawnProcess) -> None:
        receiver = receiver_of("shm", region)
        await receiver.start("shm")
        pipe.send((sendable(receiver.open("shm", REQUEST, ids(*target))), target))
        await asyncio.to_thread(until_stopped, process)
        receiver.close_ticket(REQUEST)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await receiver.settle(REQUEST)
        settling = asyncio.ensure_future(receiver.settle(REQUEST))
        if end == "is killed":
            await asyncio.to_thread(kill, process)
        else:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGCONT)
        await settling
        slices(region)[:, :, target] = 0xDD  # somebody else's
        if end == "goes on":
            assert "closed the ticket" in str(await heard(pipe))
        assert (slices(region)[:, :, target] == 0xDD).all()
        await receiver.close()

    region = HostRegion.allocate(TARGET_LAYOUT)
    with child(transfer_child.send_and_halt, "shm") as (process, pipe):
        asyncio.run(asyncio.wait_for(scenario(region, pipe, process), 60))
    region.close()


def until_stopped(process: SpawnProcess) -> None:
    assert process.pid is not None
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_no_late_write_reaches_blocks_handed_on() -> None:
    """Tickets closed under a writer's hands, over and over, wherever it may be."""

    async def scenario(region: HostRegion, pipe: Pipe) -> None:
        receiver = receiver_of("shm", region)
        await receiver.start("shm")
        for turn in range(100):
            request_id = RequestId(f"req-{turn}")
            pipe.send((sendable(receiver.open("shm", request_id, everything)), everything))
            assert await heard(pipe) == "writing"
            receiver.close_ticket(request_id)
            await receiver.settle(request_id)
            slices(region)[:] = 0xDD
            assert "closed the ticket" in str(await heard(pipe))
            assert (slices(region) == 0xDD).all()
        pipe.send(None)
        await receiver.close()

    everything = ids(*range(SMALL.blocks))
    region = HostRegion.allocate(SMALL)
    with child(transfer_child.send_until_closed, "shm") as (_, pipe):
        asyncio.run(asyncio.wait_for(scenario(region, pipe), 60))
    region.close()
