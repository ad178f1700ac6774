"""Transports by name, and what a worker uses: its end of each transport that it allows.

Built in are inproc, shm, nixl, ucx and tcp; nixl and ucx need packages of their own. Others come as packages with an
entry point in the group `baton.transports` that names a Transport.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from prometheus_client import CollectorRegistry

from baton.errors import SettingsError, TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from kvtransfer.inproc import InprocHub, InprocReceiver, InprocSender
from kvtransfer.interface import Connection, Offer, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.nixl.package import installed
from kvtransfer.port import AS_THEY_LIE, Place, Port, Transport
from kvtransfer.shm.receiver import ShmReceiver
from kvtransfer.shm.sender import ShmSender
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.sender import TcpSender
from kvtransfer.tls import TlsFiles

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "baton.transports"
OFFERS_MAX = 16
"""Tried for one ticket; the rest are ignored."""


def _inproc(place: Place) -> Port:
    return Port(InprocReceiver(place.hub, place.region), InprocSender(place.hub, place.region, place.metrics))


def _shm(place: Place) -> Port:
    return Port(ShmReceiver(place.region), ShmSender(place.region, place.metrics))


def _tcp(place: Place) -> Port:
    return Port(TcpReceiver(place), TcpSender(place))


def _nixl(place: Place) -> Port:
    from kvtransfer.nixl.port import make_port  # loads the package, which takes a while

    return make_port(place)


def _ucx(place: Place) -> Port:
    from kvtransfer.ucx.port import make_port

    return make_port(place)


def _package(extra: str, is_installed: Callable[[], object]) -> Callable[[], str | None]:
    sentence = f"Its package is not installed; pip install 'kvbaton[{extra}]' brings it."
    return lambda: None if is_installed() else sentence


BUILT_IN = {
    "inproc": Transport(_inproc),
    "shm": Transport(_shm),
    "nixl": Transport(_nixl, _package("nixl", installed)),
    "ucx": Transport(_ucx, _package("ucx", lambda: find_spec("ucxx"))),
    "tcp": Transport(_tcp),
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


def make_ports(
    transports: Sequence[str],
    region: Region,
    registry: CollectorRegistry,
    host: str = "127.0.0.1",
    port: int = 0,
    advertise_host: str = "127.0.0.1",
    hub: InprocHub | None = None,
    secret: bytes | None = None,
    tls: TlsFiles | None = None,
) -> "Ports":
    """One worker's ends of `transports`, best first. Those that are missing here are left out with a line in the log.

    Raises SettingsError for one that is unknown, or if all are missing.
    """
    place = Place(region, TransferMetrics(registry), host, port, advertise_host, hub or InprocHub(), secret, tls)
    found = {name: find_transport(name) for name in transports}
    missing = {name: reason for name, transport in found.items() if (reason := transport.missing())}
    if len(missing) == len(found):
        raise SettingsError(f"None of the allowed transports can be used here: {' '.join(missing.values())}")
    for name, reason in missing.items():
        log.info("transport %s is not used: %s", name, reason)
    return Ports(place, {name: found[name].make_port(place) for name in found if name not in missing})


class Ports:
    """All that a worker moves KV blocks with. A transport is brought up when it is first needed."""

    def __init__(self, place: Place, ports: dict[str, Port]) -> None:
        self.region, self.metrics = place.region, place.metrics
        self._ports = ports
        self._started: set[str] = set()
        self._starting = asyncio.Lock()

    @property
    def transports(self) -> tuple[str, ...]:
        """Best first."""
        return tuple(self._ports)

    # ---- receiving

    async def start(self, transport: str) -> None:
        """Makes this worker reachable by it, before the first `open`. Raises TransferError if that cannot be."""
        async with self._starting:
            if transport not in self._started:
                await self._port(transport).receiver.start()
                self._started.add(transport)

    def open(self, transport: str, request_id: RequestId, blocks: Sequence[BlockId]) -> Offer:
        """Lets whoever holds the offer write into `blocks` until `close_ticket`; an earlier ticket of the request by
        this transport is closed. After `start`. Raises TransferError where the region cannot be reached by it."""
        assert transport in self._started
        for offer in self._ports[transport].receiver.open(request_id, blocks):
            return offer
        raise TransferError(f"This worker's KV region cannot be reached by {transport} now.")

    def close_ticket(self, request_id: RequestId) -> None:
        for transport in self._started:
            self._ports[transport].receiver.close_ticket(request_id)

    async def settle(self, request_id: RequestId) -> None:
        """As Receiver.settle, whichever transports the request's tickets were open on."""
        for transport in tuple(self._started):
            await self._ports[transport].receiver.settle(request_id)

    # ---- sending

    def converts(self, transport: str) -> bool:
        """Whether it can send to a receiver whose blocks hold another number of tokens."""
        return self._ports[transport].converts

    async def connect(self, request_id: RequestId, offers: Sequence[Offer], layout: KVLayout) -> Connection:
        """Takes the first offer that works; `layout` is the peer's. If its blocks are not of this worker's size, the
        connection must `read_from` something that has such. Raises TransferError, with each offer's reason, if none
        does."""
        if reason := self.region.layout.unconvertible(layout):
            raise TransferError(reason)
        reasons = []
        for offer in offers[:OFFERS_MAX]:
            try:
                return await self._try(offer, layout)
            except TransferError as error:
                reasons.append(f"{offer.transport[:32]}: {error}")
        tried = " ".join(reasons) or "There were none."
        raise TransferError(f"No transport offered for request {request_id} works from here. {tried}")

    async def _try(self, offer: Offer, layout: KVLayout) -> Connection:
        port = self._port(offer.transport)
        if not (port.converts or self.region.layout.is_compatible(layout)):
            raise TransferError(AS_THEY_LIE)
        sender = port.sender
        try:
            return await sender.connect(offer, layout)
        except TransferError:
            self.metrics.failed(sender.transport, "out")
            raise

    def _port(self, transport: str) -> Port:
        if transport not in self._ports:
            raise TransferError("It is not allowed here.")
        return self._ports[transport]

    async def close(self) -> None:
        """Idempotent. Whatever was started, and what connections are left."""
        for port in self._ports.values():
            await port.sender.close()
        while self._started:
            await self._ports[self._started.pop()].receiver.close()
