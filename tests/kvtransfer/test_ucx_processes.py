"""Peers that are stopped, not dead: their sockets stay open and nothing says that they are gone."""

import asyncio
import os
import signal
from importlib.util import find_spec
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess

import pytest
import transfer_child
from prometheus_client import CollectorRegistry
from test_two_processes import child, heard, receiver_of, sendable
from transfer_child import LARGE
from transfer_rig import REQUEST, ids, slices

from baton.errors import TransferError
from kvtransfer.interface import Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.port import Place
from kvtransfer.region import HostRegion
from kvtransfer.ucx.context import Context
from kvtransfer.ucx.devices import net_devices
from kvtransfer.ucx.sender import UcxSender

pytestmark = pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed")
EVERYTHING = ids(*range(LARGE.blocks))


def stop(process: SpawnProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)


def go_on(process: SpawnProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)


def test_a_receiver_that_is_stopped_is_given_up() -> None:
    async def scenario(pipe: Pipe, process: SpawnProcess) -> None:
        source = HostRegion.allocate(LARGE)
        place = Place(source, TransferMetrics(CollectorRegistry()))
        sender = UcxSender(place, Context(net_devices("127.0.0.1")), stall_timeout_s=0.3)
        (offer,) = [Offer(*offer) for offer in await heard(pipe)]  # type: ignore[attr-defined]
        connection = await sender.connect(offer, LARGE)
        await connection.write(0, ids(1), ids(1))
        stop(process)
        with pytest.raises(TransferError, match=r"took nothing for 0\.3 s"):
            await connection.write(0, EVERYTHING, EVERYTHING)
        async with asyncio.timeout(10):
            await sender.close()
        source.close()

    with child(transfer_child.receive_for_ever, "ucx") as (process, pipe):
        asyncio.run(asyncio.wait_for(scenario(pipe, process), 60))


def test_a_sender_that_is_stopped_writes_nothing_after_its_ticket_is_closed() -> None:
    async def scenario(region: HostRegion, pipe: Pipe, process: SpawnProcess) -> None:
        receiver = receiver_of("ucx", region)
        await receiver.start("ucx")
        pipe.send((sendable(receiver.open("ucx", REQUEST, EVERYTHING)), list(EVERYTHING)))
        assert await heard(pipe) == "writing"
        stop(process)
        async with asyncio.timeout(10):
            receiver.close_ticket(REQUEST)
            await receiver.settle(REQUEST)
        slices(region)[:] = 0
        go_on(process)
        await asyncio.to_thread(process.join, 40)  # it finds its ticket closed and ends by that error
        assert process.exitcode == 1
        assert not slices(region).any()
        async with asyncio.timeout(10):
            await receiver.close()

    region = HostRegion.allocate(LARGE)
    with child(transfer_child.send_for_ever, "ucx") as (process, pipe):
        asyncio.run(asyncio.wait_for(scenario(region, pipe, process), 60))
    region.close()
