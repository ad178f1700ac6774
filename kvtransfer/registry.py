"""Transports by name, and what a worker uses: one receiver or sender over all that it allows.

Built in are inproc, shm and tcp. Others come as packages with an entry point in the group
`baton.transports` that names a Transport.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from prometheus_client import CollectorRegistry

from baton.errors import SettingsError, TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from kvtransfer.inproc import InprocHub, InprocReceiver, InprocSender
from kvtransfer.interface import Connection, Offer, Receiver, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.shm.receiver import ShmReceiver
from kvtransfer.shm.sender import ShmSender
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.sender import TcpSender

ENTRY_POINT_GROUP = "baton.transports"
OFFERS_MAX = 16
"""Tried for one ticket; the rest are ignored."""


@dataclass(frozen=True, slots=True)
class Place:
    """What transports are built on: one worker's region, where it can be reached, where its metrics go."""

    region: Region
    metrics: TransferMetrics
    host: str = "127.0.0.1"
    port: int = 0
    advertise_host: str = "127.0.0.1"
    hub: InprocHub = field(default_factory=InprocHub)


class TransportSender(Protocol):
    """One transport's part of a Sender."""

    transport: str

    async def connect(self, offer: Offer, layout: KVLayout) -> Connection:
        """Raises TransferError with the reason if this offer does not work from here."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Transport:
    make_receiver: Callable[[Place], Receiver]
    make_sender: Callable[[Place], TransportSender]


BUILT_IN = {
    "inproc": Transport(
        lambda place: InprocReceiver(place.hub, place.region),
        lambda place: InprocSender(place.hub, place.region, place.metrics),
    ),
    "shm": Transport(
        lambda place: ShmReceiver(place.region),
        lambda place: ShmSender(place.region, place.metrics),
    ),
    "tcp": Transport(
        lambda place: TcpReceiver(place.region, place.host, place.port, place.advertise_host, place.metrics),
        lambda place: TcpSender(place.region, place.metrics),
    ),
}


def find_transport(name: str) -> Transport:
    """Raises SettingsError if there is no such transport or it cannot be loaded."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in installed:
        known = ", ".join(sorted({*BUILT_IN, *installed}))
        raise SettingsError(f"Transport {name!r} is unknown or not installed; this installation has: {known}.")
    return _load(installed[name])


def _load(point: EntryPoint) -> Transport:
    try:
        transport = point.load()
    except ImportError as error:
        raise SettingsError(f"Transport {point.name!r} is installed, but does not load: {error}.") from None
    if not isinstance(transport, Transport):
        raise SettingsError(f"Transport {point.name!r} is installed, but {point.value} is not a Transport.")
    return transport


def make_receiver(
    transports: Sequence[str],
    region: Region,
    host: str,
    port: int,
    advertise_host: str,
    registry: CollectorRegistry,
    hub: InprocHub | None = None,
) -> "Receivers":
    """The decode side over `transports`, best first. Raises SettingsError for one that is not to be had."""
    place = Place(region, TransferMetrics(registry), host, port, advertise_host, hub or InprocHub())
    return Receivers([find_transport(name).make_receiver(place) for name in transports])


def make_sender(
    transports: Sequence[str], region: Region, registry: CollectorRegistry, hub: InprocHub | None = None
) -> "Senders":
    """The prefill side over `transports`. Raises SettingsError for one that is not to be had."""
    place = Place(region, TransferMetrics(registry), hub=hub or InprocHub())
    return Senders(region, [find_transport(name).make_sender(place) for name in transports], place.metrics)


class Receivers:
    """One Receiver made of several: a ticket is open on all of them."""

    def __init__(self, receivers: Sequence[Receiver]) -> None:
        self._receivers = tuple(receivers)

    async def start(self) -> None:
        try:
            for receiver in self._receivers:
                await receiver.start()
        except BaseException:
            await self.close()
            raise

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        offers = tuple(offer for receiver in self._receivers for offer in receiver.open(request_id, blocks))
        if not offers:
            raise TransferError("None of the allowed transports can reach this worker's KV region now.")
        return offers

    def close_ticket(self, request_id: RequestId) -> None:
        for receiver in self._receivers:
            receiver.close_ticket(request_id)

    async def close(self) -> None:
        for receiver in self._receivers:
            await receiver.close()


class Senders:
    """One Sender made of several: it takes the first offer that one of them can serve."""

    def __init__(self, region: Region, senders: Sequence[TransportSender], metrics: TransferMetrics) -> None:
        self._region, self._metrics = region, metrics
        self._senders = {sender.transport: sender for sender in senders}

    async def connect(self, request_id: RequestId, offers: Sequence[Offer], layout: KVLayout) -> Connection:
        if not self._region.layout.is_compatible(layout):
            raise TransferError("The KV layouts of sender and receiver differ in more than the number of blocks.")
        reasons = []
        for offer in offers[:OFFERS_MAX]:
            try:
                return await self._try(offer, layout)
            except TransferError as error:
                reasons.append(f"{offer.transport[:32]}: {error}")
        tried = " ".join(reasons) or "There were none."
        raise TransferError(f"No transport offered for request {request_id} works from here. {tried}")

    async def _try(self, offer: Offer, layout: KVLayout) -> Connection:
        sender = self._senders.get(offer.transport)
        if sender is None:
            raise TransferError("It is not allowed here.")
        try:
            return await sender.connect(offer, layout)
        except TransferError:
            self._metrics.failed(sender.transport, "out")
            raise

    async def close(self) -> None:
        for sender in self._senders.values():
            await sender.close()
