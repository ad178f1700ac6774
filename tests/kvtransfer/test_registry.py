"""Which transports a worker has, and which of them a ticket takes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import ModuleType

import pytest
from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, StagedRegion, ids, open_fds, tampered

from baton.errors import SettingsError, TransferError
from baton.ids import RequestId
from kvtransfer import registry
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Offer
from kvtransfer.nixl import package
from kvtransfer.port import Place, Port, Transport
from kvtransfer.region import HostRegion
from kvtransfer.registry import BUILT_IN, OFFERS_MAX, Ports, find_transport, make_ports

ANOTHER = RequestId("req-2")


class Ends:
    """A receiver and a sender with lists of transports of their own."""

    def __init__(self, receives: Sequence[str], sends: Sequence[str], target: HostRegion | None = None) -> None:
        self.source, self.target = HostRegion.allocate(SOURCE_LAYOUT), target or HostRegion.allocate(TARGET_LAYOUT)
        self.sent, hub = CollectorRegistry(), InprocHub()
        self.receiver = make_ports(receives, self.target, CollectorRegistry(), hub=hub)
        self.sender = make_ports(sends, self.source, self.sent, hub=hub)

    async def offer(self, transport: str, request_id: RequestId = REQUEST) -> Offer:
        await self.receiver.start(transport)
        return self.receiver.open(transport, request_id, ids(1))

    def counted(self, name: str, transport: str) -> float | None:
        labels = {"transport": transport, "direction": "out"}
        return self.sent.get_sample_value(f"baton_kv_transfer_{name}_total", labels)


@asynccontextmanager
async def ends_of(
    receives: Sequence[str], sends: Sequence[str], target: HostRegion | None = None
) -> AsyncIterator[Ends]:
    ends = Ends(receives, sends, target)
    try:
        yield ends
    finally:
        await ends.sender.close()
        await ends.receiver.close()
        ends.source.close()
        ends.target.close()


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
def test_an_offer_is_taken_by_its_transport_and_counted(transport: str) -> None:
    async def scenario() -> None:
        async with ends_of(["tcp", "shm", "inproc"], ["shm", "inproc", "tcp"]) as ends:
            offer = await ends.offer(transport)
            connection = await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
            assert connection.transport == offer.transport == transport
            assert ends.counted("connections", transport) == 1

    asyncio.run(scenario())


def test_an_offer_that_does_not_work_is_passed_over_and_counted() -> None:
    async def scenario() -> None:
        async with ends_of(["shm", "tcp"], ["shm", "tcp"]) as ends:
            shm, tcp = await ends.offer("shm"), await ends.offer("tcp")
            connection = await ends.sender.connect(REQUEST, [tampered(shm, 6), tcp], TARGET_LAYOUT)
            assert connection.transport == "tcp"
            assert ends.counted("failures", "shm") == 1

    asyncio.run(scenario())


def test_when_none_works_every_reason_is_told_and_no_secret() -> None:
    async def scenario() -> None:
        async with ends_of(["shm", "tcp"], ["shm", "tcp"]) as ends:
            shm, tcp = await ends.offer("shm"), await ends.offer("tcp")
            ends.receiver.close_ticket(REQUEST)
            offers = [tampered(shm, 6), Offer("ucx", b"secret"), tcp]
            with pytest.raises(TransferError) as refusal:
                await ends.sender.connect(REQUEST, offers, TARGET_LAYOUT)
            told = str(refusal.value)
            assert "shm: The other process runs on another machine." in told
            assert "ucx: It is not allowed here." in told
            assert "tcp: The receiver" in told
            assert "b'" not in told

    asyncio.run(scenario())


def test_no_offers_is_a_reason_too() -> None:
    async def scenario() -> None:
        async with ends_of(["tcp"], ["tcp"]) as ends:
            with pytest.raises(TransferError, match="There were none"):
                await ends.sender.connect(REQUEST, [], TARGET_LAYOUT)

    asyncio.run(scenario())


def test_of_too_many_offers_the_rest_are_ignored() -> None:
    async def scenario() -> None:
        async with ends_of(["inproc"], ["inproc"]) as ends:
            offers = [Offer("inproc", b"wrong")] * OFFERS_MAX + [await ends.offer("inproc")]
            with pytest.raises(TransferError):
                await ends.sender.connect(REQUEST, offers, TARGET_LAYOUT)
            await ends.sender.connect(REQUEST, offers[1:], TARGET_LAYOUT)

    asyncio.run(scenario())


# ---- bringing transports up


class Counting:
    """A receiver that says what was asked of it, and may not start."""

    def __init__(self, failure: str = "") -> None:
        self.failure, self.said = failure, list[str]()

    async def start(self) -> None:
        self.said.append("start")
        await asyncio.sleep(0)
        if self.failure:
            raise TransferError(self.failure)

    def open(self, request_id: RequestId, blocks: Sequence[int]) -> Sequence[Offer]:
        self.said.append(f"open {request_id} {blocks}")
        return ()

    def close_ticket(self, request_id: RequestId) -> None:
        self.said.append(f"close {request_id}")

    async def settle(self, request_id: RequestId) -> None:
        self.said.append(f"settle {request_id}")

    async def close(self) -> None:
        self.said.append("end")


class NoSender:
    transport = "none"

    async def close(self) -> None: ...


def counting_ports(**receivers: Counting) -> Ports:
    region = HostRegion.allocate(SOURCE_LAYOUT)
    place = Place(region, registry.TransferMetrics(CollectorRegistry()))
    region.close()
    return Ports(place, {name: Port(receiver, NoSender()) for name, receiver in receivers.items()})  # type: ignore[arg-type]


def test_a_transport_is_brought_up_once_and_only_when_it_is_wanted() -> None:
    async def scenario() -> None:
        wanted, unwanted = Counting(), Counting()
        ports = counting_ports(wanted=wanted, unwanted=unwanted)
        assert ports.transports == ("wanted", "unwanted")
        await asyncio.gather(ports.start("wanted"), ports.start("wanted"))
        ports.close_ticket(REQUEST)
        await ports.settle(REQUEST)
        await ports.close()
        await ports.close()
        assert wanted.said == ["start", f"close {REQUEST}", f"settle {REQUEST}", "end"]
        assert unwanted.said == []

    asyncio.run(scenario())


def test_one_that_does_not_come_up_is_tried_anew_the_next_time() -> None:
    async def scenario() -> None:
        receiver = Counting(failure="The port is taken.")
        ports = counting_ports(one=receiver)
        for _ in range(2):
            with pytest.raises(TransferError, match="port is taken"):
                await ports.start("one")
        with pytest.raises(TransferError, match="not allowed here"):
            await ports.start("another")
        await ports.close()
        assert receiver.said == ["start", "start"]

    asyncio.run(scenario())


def test_a_region_that_a_transport_cannot_reach_is_not_offered_by_it() -> None:
    async def scenario() -> None:
        async with ends_of(["shm"], ["shm"], target=StagedRegion.allocate(TARGET_LAYOUT)) as ends:
            with pytest.raises(TransferError, match="cannot be reached by shm now"):
                await ends.offer("shm")

    asyncio.run(scenario())


def test_a_ticket_is_closed_and_settled_whichever_transport_it_was_opened_on() -> None:
    async def scenario() -> None:
        async with ends_of(["shm", "tcp", "inproc"], ["shm", "tcp", "inproc"]) as ends:
            offers = [await ends.offer(transport) for transport in ends.receiver.transports]
            others = [await ends.offer(transport, ANOTHER) for transport in ends.receiver.transports]
            ends.receiver.close_ticket(REQUEST)
            await ends.receiver.settle(REQUEST)
            for offer, other in zip(offers, others, strict=True):
                with pytest.raises(TransferError):
                    await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
                await ends.sender.connect(ANOTHER, [other], TARGET_LAYOUT)

    asyncio.run(scenario())


def test_a_taken_port_is_told_and_leaves_nothing_open() -> None:
    async def scenario() -> None:
        async with ends_of(["tcp"], ["tcp"]) as ends:
            await ends.receiver.start("tcp")
            port = ends.receiver._ports["tcp"].receiver.port  # type: ignore[attr-defined]
            other = make_ports(["tcp"], ends.target, CollectorRegistry(), port=port)
            before = open_fds()
            with pytest.raises(TransferError, match=r"cannot come in at 127\.0\.0\.1:\d+: .*in use"):
                await other.start("tcp")
            assert open_fds() <= before
            await other.close()

    asyncio.run(scenario())


# ---- which there are


def lacking(monkeypatch: pytest.MonkeyPatch, name: str, why: str) -> None:
    def make_port(place: Place) -> Port:
        raise AssertionError(f"{name} is missing, and so not made at {place}")

    monkeypatch.setitem(BUILT_IN, name, Transport(make_port, lambda: why))


def test_a_transport_whose_package_is_missing_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking(monkeypatch, "nixl", "The package nixl is not installed.")
    region = HostRegion.allocate(SOURCE_LAYOUT)
    with caplog.at_level(logging.INFO, registry.log.name):
        ports = make_ports(["nixl", "inproc"], region, CollectorRegistry())
    assert ports.transports == ("inproc",)
    assert caplog.messages == ["transport nixl is not used: The package nixl is not installed."]
    region.close()


def test_if_all_are_missing_the_start_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "nixl", "There is no nixl.")
    lacking(monkeypatch, "ucx", "There is no ucx.")
    region = HostRegion.allocate(SOURCE_LAYOUT)
    with pytest.raises(SettingsError, match=r"can be used here: There is no nixl\. There is no ucx\."):
        make_ports(["nixl", "ucx"], region, CollectorRegistry())
    region.close()


@pytest.mark.parametrize(("name", "where"), [("nixl", package), ("ucx", registry)])
def test_what_to_install_is_told(name: str, where: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "find_spec", lambda package: None)  # noqa: ARG005
    assert f"pip install 'kvbaton[{name}]'" in (BUILT_IN[name].missing() or "")
    monkeypatch.setattr(where, "find_spec", lambda package: package)
    assert BUILT_IN[name].missing() is None


def test_what_is_built_in_is_not_missing() -> None:
    assert [BUILT_IN[name].missing() for name in ("inproc", "shm", "tcp")] == [None] * 3


class Point:
    """As importlib.metadata.EntryPoint."""

    value = "somewhere:TRANSPORT"

    def __init__(self, name: str, found: object) -> None:
        self.name, self._found = name, found

    def load(self) -> object:
        if isinstance(self._found, ImportError):
            raise self._found
        return self._found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        Point("rdma", BUILT_IN["inproc"]),
        Point("broken", ImportError("No module named 'pigeons'")),
        Point("odd", 3),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "baton.transports" else [])


def test_an_unknown_transport_is_told_with_what_there_is() -> None:
    with pytest.raises(SettingsError, match=r"'carrier-pigeon' is unknown.*: inproc, nixl, shm, tcp, ucx\."):
        find_transport("carrier-pigeon")


@pytest.mark.usefixtures("installed")
def test_another_package_can_bring_a_transport() -> None:
    region = HostRegion.allocate(SOURCE_LAYOUT)
    assert make_ports(["rdma", "tcp"], region, CollectorRegistry()).transports == ("rdma", "tcp")
    region.close()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "reason"), [("broken", "does not load: No module named 'pigeons'"), ("odd", "is not a Transport")]
)
def test_a_transport_that_does_not_load_is_told(name: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        find_transport(name)
