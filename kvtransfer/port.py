"""What a transport is made of and from: one worker's place in, its two ends out."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Receiver, Region, TransportSender
from kvtransfer.metrics import TransferMetrics
from kvtransfer.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Place:
    """What transports are built on: one worker's region, where it can be reached, what it proves itself with."""

    region: Region
    metrics: TransferMetrics
    host: str = "127.0.0.1"
    port: int = 0
    advertise_host: str = "127.0.0.1"
    hub: InprocHub = field(default_factory=InprocHub)
    secret: bytes | None = field(default=None, repr=False)
    """The cluster's; without one anybody who has a ticket may write under it."""
    tls: TlsFiles | None = None
    """For tcp."""


AS_THEY_LIE = "It moves KV blocks as they lie, so not between workers whose blocks hold unlike numbers of tokens."


@dataclass(frozen=True, slots=True)
class Port:
    """One worker's end of one transport, both ways. Neither side costs anything before it is used."""

    receiver: Receiver
    sender: TransportSender
    converts: bool = True
    """Whether its connections can `read_from` something else than the worker's region, which is what carries KV to a
    receiver whose blocks hold another number of tokens."""


def _nothing() -> None:
    """Missing."""


@dataclass(frozen=True, slots=True)
class Transport:
    make_port: Callable[[Place], Port]
    missing: Callable[[], str | None] = _nothing
    """Why it cannot be used here, such as a package that is not installed, as a sentence; None: it can."""
