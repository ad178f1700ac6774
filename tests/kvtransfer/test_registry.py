"""Which transport a pair of workers gets."""

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, StagedRegion, ids, open_fds, tampered

from baton.errors import SettingsError, TransferError
from kvtransfer import registry
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Offer
from kvtransfer.region import HostRegion
from kvtransfer.registry import BUILT_IN, Receivers, Senders, Transport, find_transport, make_receiver, make_sender


class Ends:
    """A receiver and a sender with lists of transports of their own."""

    def __init__(
        self, receives: Sequence[str], sends: Sequence[str], target: HostRegion | None = None, port: int = 0
    ) -> None:
        self.source, self.target = HostRegion.allocate(SOURCE_LAYOUT), target or HostRegion.allocate(TARGET_LAYOUT)
        self.sent, hub = CollectorRegistry(), InprocHub()
        self.receiver = make_receiver(receives, self.target, "127.0.0.1", port, "127.0.0.1", CollectorRegistry(), hub)
        self.sender = make_sender(sends, self.source, self.sent, hub)

    async def __aenter__(self) -> "Ends":
        await self.receiver.start()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.sender.close()
        await self.receiver.close()
        self.source.close()
        self.target.close()


@pytest.mark.parametrize(
    ("receives", "sends", "taken"),
    [
        (["shm", "tcp"], ["shm", "tcp"], "shm"),
        (["tcp", "shm"], ["shm", "tcp"], "tcp"),
        (["shm", "tcp"], ["tcp"], "tcp"),
        (["tcp"], ["shm", "tcp"], "tcp"),
        (["inproc", "shm", "tcp"], ["shm", "inproc"], "inproc"),
    ],
)
def test_the_first_offer_that_both_allow_is_taken(receives: list[str], sends: list[str], taken: str) -> None:
    async def scenario() -> None:
        async with Ends(receives, sends) as ends:
            offers = ends.receiver.open(REQUEST, ids(1))
            assert [offer.transport for offer in offers] == receives
            connection = await ends.sender.connect(REQUEST, offers, TARGET_LAYOUT)
            assert connection.transport == taken
            labels = {"transport": taken, "direction": "out"}
            assert ends.sent.get_sample_value("baton_kv_transfer_connections_total", labels) == 1

    asyncio.run(scenario())


def test_an_offer_that_does_not_work_is_passed_over_and_counted() -> None:
    async def scenario() -> None:
        async with Ends(["shm", "tcp"], ["shm", "tcp"]) as ends:
            shm, tcp = ends.receiver.open(REQUEST, ids(1))
            connection = await ends.sender.connect(REQUEST, [tampered(shm, 6), tcp], TARGET_LAYOUT)
            assert connection.transport == "tcp"
            labels = {"transport": "shm", "direction": "out"}
            assert ends.sent.get_sample_value("baton_kv_transfer_failures_total", labels) == 1

    asyncio.run(scenario())


def test_when_none_works_every_reason_is_told_and_no_secret() -> None:
    async def scenario() -> None:
        async with Ends(["shm", "tcp"], ["shm", "tcp"]) as ends:
            shm, tcp = ends.receiver.open(REQUEST, ids(1))
            offers = [tampered(shm, 6), Offer("ucx", b"secret"), tampered(tcp, 12)]
            with pytest.raises(TransferError) as refusal:
                await ends.sender.connect(REQUEST, offers, TARGET_LAYOUT)
            told = str(refusal.value)
            assert "shm: The other process runs on another machine." in told
            assert "ucx: It is not allowed here." in told
            assert "tcp: The receiver knows no open ticket with that secret." in told
            assert "b'" not in told

    asyncio.run(scenario())


def test_no_offers_is_a_reason_too() -> None:
    async def scenario() -> None:
        async with Ends(["tcp"], ["tcp"]) as ends:
            with pytest.raises(TransferError, match="There were none"):
                await ends.sender.connect(REQUEST, [], TARGET_LAYOUT)

    asyncio.run(scenario())


def test_a_region_that_cannot_be_shared_is_not_offered_by_shm() -> None:
    async def scenario() -> None:
        async with Ends(["shm", "tcp"], ["tcp"], StagedRegion.allocate(TARGET_LAYOUT)) as ends:
            assert [offer.transport for offer in ends.receiver.open(REQUEST, ids(1))] == ["tcp"]
        async with Ends(["shm"], ["tcp"], StagedRegion.allocate(TARGET_LAYOUT)) as ends:
            with pytest.raises(TransferError, match="None of the allowed transports"):
                ends.receiver.open(REQUEST, ids(1))

    asyncio.run(scenario())


def test_a_taken_port_is_told_and_leaves_nothing_open() -> None:
    async def scenario() -> None:
        async with Ends(["tcp"], ["tcp"]) as ends:
            (receiver,) = ends.receiver._receivers
            other = Ends(["shm", "tcp"], ["tcp"], port=receiver.port)  # type: ignore[attr-defined]
            before = open_fds()
            with pytest.raises(TransferError, match=r"cannot come in at 127\.0\.0\.1:\d+: .*in use"):
                await other.receiver.start()
            assert open_fds() == before
            await other.__aexit__()

    asyncio.run(scenario())


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
        Point("ucx", BUILT_IN["inproc"]),
        Point("nixl", ImportError("No module named 'nixl'")),
        Point("odd", 3),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "baton.transports" else [])


def test_an_unknown_transport_is_told_with_what_there_is() -> None:
    with pytest.raises(SettingsError, match=r"'carrier-pigeon' is unknown or not installed.*inproc, shm, tcp"):
        find_transport("carrier-pigeon")


@pytest.mark.usefixtures("installed")
def test_another_package_can_bring_a_transport() -> None:
    assert isinstance(find_transport("ucx"), Transport)
    region = HostRegion.allocate(SOURCE_LAYOUT)
    sender = make_sender(["ucx", "tcp"], region, CollectorRegistry())
    receiver = make_receiver(["ucx"], region, "127.0.0.1", 0, "127.0.0.1", CollectorRegistry())
    assert isinstance(sender, Senders)
    assert isinstance(receiver, Receivers)
    region.close()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "reason"), [("nixl", "does not load: No module named 'nixl'"), ("odd", "is not a Transport")]
)
def test_a_transport_that_does_not_load_is_told(name: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        find_transport(name)
