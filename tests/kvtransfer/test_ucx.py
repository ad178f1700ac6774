"""Links over real UCX in one process: proofs, fences, bounds, and what they leave behind."""

import asyncio
import gc
import importlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from test_transports import BIG_SOURCE
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, fill_random, ids, open_fds, slices

from baton.errors import TransferError
from baton.ids import RequestId
from baton.layout import KVLayout
from kvtransfer.control import Address
from kvtransfer.interface import Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.port import Place
from kvtransfer.region import HostRegion
from kvtransfer.ucx import context as ucx_context
from kvtransfer.ucx import receiver as receiver_module
from kvtransfer.ucx.channel import Channel
from kvtransfer.ucx.context import Context
from kvtransfer.ucx.devices import ALL, net_devices
from kvtransfer.ucx.inlet import PATIENCE, Patience
from kvtransfer.ucx.receiver import UcxReceiver
from kvtransfer.ucx.sender import UcxSender
from kvtransfer.ucx.wire import Frame, Kind

pytestmark = pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed")
SECRET = b"the cluster's own secret"
SHORT = Patience(hello_s=1.0, stall_s=1.0, idle_s=1.0, linger_s=0.2)


@dataclass(slots=True)
class Ends:
    source: HostRegion
    target: HostRegion
    receiver: UcxReceiver
    sender: UcxSender

    async def connect(self, *blocks: int, request_id: RequestId = REQUEST) -> Any:
        (offer,) = self.receiver.open(request_id, ids(*blocks))
        return await self.sender.connect(offer, self.target.layout)


@asynccontextmanager
async def ends(
    layout: KVLayout = TARGET_LAYOUT,
    secrets: tuple[bytes | None, bytes | None] = (SECRET, SECRET),
    patience: Patience = PATIENCE,
    **of_sender: float,
) -> AsyncIterator[Ends]:
    source, target = HostRegion.allocate(layout), HostRegion.allocate(layout)
    fill_random(source, seed=1)
    devices = net_devices("127.0.0.1")
    there = Place(target, TransferMetrics(CollectorRegistry()), secret=secrets[0])
    here = Place(source, TransferMetrics(CollectorRegistry()), secret=secrets[1])
    receiver = UcxReceiver(there, Context(devices), patience)
    sender = UcxSender(here, Context(devices), **of_sender)
    await receiver.start()
    try:
        yield Ends(source, target, receiver, sender)
    finally:
        await sender.close()
        await receiver.close()
        source.close()
        target.close()


def run(scenario: Callable[[Ends], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def body() -> None:
        async with asyncio.timeout(60), ends(**options) as both:
            await scenario(both)

    asyncio.run(body())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what UCX does in between tells nobody
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("secrets", [(SECRET, None), (None, SECRET), (SECRET, b"the secret of another one")])
def test_another_cluster_secret_opens_nothing(secrets: tuple[bytes | None, bytes | None]) -> None:
    async def scenario(both: Ends) -> None:
        with pytest.raises(TransferError, match="another cluster secret"):
            await both.connect(1)

    run(scenario, secrets=secrets)


def test_without_cluster_secrets_the_ticket_is_enough() -> None:
    async def scenario(both: Ends) -> None:
        connection = await both.connect(1)
        await connection.write(0, ids(1), ids(1))
        await connection.fence()
        assert (slices(both.target)[0, :, 1] == slices(both.source)[0, :, 1]).all()

    run(scenario, secrets=(None, None))


def test_no_secret_goes_over_the_control_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bytes] = []
    plain = Channel.send

    def send(channel: Channel, frame: Frame) -> None:
        said.append(frame.pack())
        plain(channel, frame)

    monkeypatch.setattr(Channel, "send", send)

    async def scenario(both: Ends) -> None:
        (offer,) = both.receiver.open(REQUEST, ids(1))
        connection = await both.sender.connect(offer, TARGET_LAYOUT)
        await connection.fence()
        everything = b"".join(said)
        assert len(said) >= 4 and SECRET not in everything
        assert Address.unpack(offer.descriptor).secret not in everything

    run(scenario)


def test_a_link_serves_ticket_after_ticket() -> None:
    async def scenario(both: Ends) -> None:
        links = []
        for block in range(4):
            request_id = RequestId(f"req-{block}")
            connection = await both.connect(block, request_id=request_id)
            links.append(connection._link)
            await connection.write(0, ids(block), ids(block))
            await connection.fence()
            await connection.close()
            both.receiver.close_ticket(request_id)
        assert len(set(map(id, links))) == 1
        assert (slices(both.target)[0, :, :4] == slices(both.source)[0, :, :4]).all()

    run(scenario)


def test_an_idle_link_is_closed_by_its_sender() -> None:
    async def scenario(both: Ends) -> None:
        connection = await both.connect(1)
        await connection.close()
        await until(lambda: not both.receiver.inflows)
        assert connection._link.failure is not None
        again = await both.connect(1)
        await again.fence()

    run(scenario, idle_s=0.05)


def test_closing_a_ticket_in_the_middle_fences_at_once() -> None:
    """What closes it may give the blocks away in the next line: bytes were landing, and land no more."""

    async def scenario(both: Ends) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        connection = await both.connect(*everything)
        writing = asyncio.ensure_future(connection.write(0, everything, everything))
        (inflow,) = both.receiver.inflows
        await until(lambda: inflow.inlet.is_landing and bool(slices(both.target).any()))
        both.receiver.close_ticket(REQUEST)
        async with asyncio.timeout(5):
            await both.receiver.settle(REQUEST)
        slices(both.target)[:] = 0
        await asyncio.wait([writing])  # by error, unless all of it had left the source
        assert writing.exception() is None or "closed the ticket" in str(writing.exception())
        with pytest.raises(TransferError, match="closed the ticket"):
            await connection.fence()
        await connection.close()
        other = await both.connect(7, request_id=RequestId("req-2"))
        await other.write(0, ids(3), ids(7))
        await other.fence()
        assert (slices(both.target)[:, :, 7] == slices(both.source)[:, :, 3]).all()
        assert not slices(both.target)[:, :, [b for b in everything if b != 7]].any()

    run(scenario, layout=BIG_SOURCE)


def test_cancelling_a_write_ends_its_reading_at_once() -> None:
    async def scenario(both: Ends) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        connection = await both.connect(*everything)
        writing = asyncio.ensure_future(connection.write(0, everything, everything))
        (inflow,) = both.receiver.inflows
        await until(lambda: inflow.inlet.is_landing)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        lane = connection._link._lane
        assert lane is not None and lane.is_closed
        await connection.close()
        await until(lambda: not both.receiver.inflows)

    run(scenario, layout=BIG_SOURCE)


def test_a_region_that_is_shared_by_many_links() -> None:
    async def scenario(both: Ends) -> None:
        async def one(block: int) -> None:
            connection = await both.connect(block, request_id=RequestId(f"req-{block}"))
            for layer in range(3):
                await connection.write(layer, ids(block % 19), ids(block))
            await connection.fence()

        await asyncio.gather(*map(one, range(24)))
        source = [block % 19 for block in range(24)]
        assert (slices(both.target)[:, :, :24] == slices(both.source)[:, :, source]).all()

    run(scenario)


def test_a_stranger_costs_one_connection() -> None:
    async def scenario(both: Ends) -> None:
        port = both.receiver.port
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n" * 20, Random(4).randbytes(4000), bytes(65536)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(garbage)
            with suppress(ConnectionResetError):
                await reader.read(-1)  # the challenge, then the end
            writer.close()
        await until(lambda: not both.receiver.inflows)
        connection = await both.connect(1)
        await connection.fence()

    run(scenario, patience=SHORT)


def test_strangers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "UNAUTHENTICATED_MAX", 3)

    async def scenario(both: Ends) -> None:
        strangers = [await asyncio.open_connection("127.0.0.1", both.receiver.port) for _ in range(5)]
        await until(lambda: sum(reader.at_eof() or bool(reader.exception()) for reader, _ in strangers) == 2)
        assert len(both.receiver.inflows) == 3
        for _, writer in strangers:
            writer.close()

    run(scenario)


def test_who_listens_but_never_answers_is_given_up() -> None:
    async def scenario(both: Ends) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = Address("127.0.0.1", silent.getsockname()[1], 1, bytes(16))
            with pytest.raises(TransferError, match=r"did not answer within 0\.2 s"):
                await both.sender.connect(Offer("ucx", address.pack()), TARGET_LAYOUT)

    run(scenario, connect_timeout_s=0.2)


def test_nobody_listens() -> None:
    async def scenario(both: Ends) -> None:
        (offer,) = both.receiver.open(REQUEST, ids(1))
        await both.receiver.close()
        with pytest.raises(TransferError, match="could not be reached"):
            await both.sender.connect(offer, TARGET_LAYOUT)

    run(scenario)


def test_a_sender_that_goes_silent_in_the_middle_is_cut() -> None:
    async def scenario(both: Ends) -> None:
        connection = await both.connect(1, 2)
        connection._link._channel.send(Frame(Kind.SLICES, bytes([0, 0, 0, 1, 0, 0, 0, 2])))
        (inflow,) = both.receiver.inflows
        await until(lambda: inflow.inlet.is_landing)
        await until(lambda: not both.receiver.inflows)
        with pytest.raises(TransferError, match="closed the connection"):
            await connection.fence()

    run(scenario, patience=SHORT)


@pytest.fixture
def clean_loop_modules() -> None:
    run(lambda _: asyncio.sleep(0))  # what is loaded or opened once


@pytest.mark.usefixtures("clean_loop_modules")
def test_broken_links_leave_nothing_open() -> None:
    async def scenario(both: Ends) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        for turn in range(6):
            request_id = RequestId(f"req-{turn}")
            connection = await both.connect(*everything, request_id=request_id)
            writing = asyncio.ensure_future(connection.write(0, everything, everything))
            (inflow,) = both.receiver.inflows
            await until(lambda inflow=inflow: inflow.inlet.is_landing)  # type: ignore[misc]
            if turn % 2:
                both.receiver.close_ticket(request_id)
            else:
                writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await connection.close()
            await until(lambda: not both.receiver.inflows)

    before = open_fds()
    run(scenario, layout=BIG_SOURCE)
    gc.collect()
    assert open_fds() <= before


def test_two_ports_of_one_process_do_not_know_each_other() -> None:
    async def scenario(both: Ends) -> None:
        async with ends(layout=SOURCE_LAYOUT, secrets=(b"another cluster" * 2, b"another cluster" * 2)) as others:
            one, other = await both.connect(1), await others.connect(2)
            await asyncio.gather(one.write(0, ids(1), ids(1)), other.write(0, ids(2), ids(2)))
            await asyncio.gather(one.fence(), other.fence())
            (offer,) = others.receiver.open(RequestId("req-2"), ids(3))
            with pytest.raises(TransferError, match="another cluster secret"):
                await both.sender.connect(offer, SOURCE_LAYOUT)

    run(scenario)


def test_idle_links_cost_no_processor_time() -> None:
    async def scenario(both: Ends) -> None:
        connections = [await both.connect(block, request_id=RequestId(f"req-{block}")) for block in range(8)]
        for connection in connections:
            await connection.fence()
        before_s = sum(os.times()[:2])
        await asyncio.sleep(1.0)  # the time that is to cost nothing
        assert sum(os.times()[:2]) - before_s < 0.15

    run(scenario)


def test_loading_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    ucx_context.Ucx()
    assert dict(os.environ) == before


def test_a_library_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(importlib, "import_module", fail)

    async def scenario() -> None:
        region = HostRegion.allocate(TARGET_LAYOUT)
        receiver = UcxReceiver(Place(region, TransferMetrics(CollectorRegistry())), Context(ALL))
        with pytest.raises(TransferError, match="UCX could not be loaded"):
            await receiver.start()
        await receiver.close()
        region.close()

    asyncio.run(scenario())


def test_devices_are_those_of_the_host() -> None:
    assert net_devices("127.0.0.1").split(",")[0] == "lo"
    assert net_devices("0.0.0.0", "127.0.0.1").split(",")[0] == "lo"
    assert net_devices("192.0.2.1") == ALL  # nobody's
    assert net_devices("::") == ALL
