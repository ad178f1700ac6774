"""A worker's way to others with KV blocks, the same for every role: transports, and links both ways."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry

from baton.clock import Clock
from baton.errors import SettingsError, TransferError
from baton.rpc.channels import Channels
from baton.secret import cluster_secret
from baton.settings import WorkerSettings
from engine.core import LocalEngine
from engine.thread import EngineThread
from engine.worker.block_source import CachedBlocks
from kvtransfer.fetch.client import Fetcher
from kvtransfer.fetch.servicer import FetchServicer
from kvtransfer.inproc import InprocHub
from kvtransfer.link.client import Links
from kvtransfer.link.expectation import Expectations
from kvtransfer.link.identity import LinkIdentity
from kvtransfer.link.metrics import LinkMetrics
from kvtransfer.link.probe import fill_source
from kvtransfer.link.servicer import LinkBook
from kvtransfer.registry import Ports, make_ports
from kvtransfer.tls import TlsContexts, TlsFiles
from kvtransfer.verify import Verifier, VerifyMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Nothing of it listens or connects before it is used."""

    ports: Ports
    link_book: LinkBook
    """Of those that this worker sends to."""
    fetch_servicer: FetchServicer
    """Gives them what its cache has."""
    links: Links
    """To those that it receives from."""
    fetcher: Fetcher
    """Gets what their caches have."""
    channels: Channels
    verifier: Verifier
    """Of all that lands here."""

    async def close_links(self) -> None:
        """Nobody can be asked for blocks any more; tickets that are under way go on."""
        await self.links.close()

    async def close(self) -> None:
        """Idempotent. Nothing is written by or to this worker any more."""
        await self.fetcher.close()
        await self.links.close()
        await self.fetch_servicer.close()
        await self.channels.close()
        await self.ports.close()


def open_transfers(
    settings: WorkerSettings,
    secret: bytes | None,
    worker_id: str,
    engine: EngineThread[LocalEngine[Any]],
    registry: CollectorRegistry,
    on_measured: Callable[[int, float], None],
    on_sent: Callable[[int, float], None],
    hub: InprocHub | None,
    clock: Clock,
) -> Transfers:
    """Before the first step of the engine: it writes the block that links are tested with. Raises SettingsError as
    `make_ports` does. `on_measured` is told of each transfer of a link's self-test, `on_sent` of each fetch that was
    answered: its bytes and seconds."""
    region, fingerprint = engine.region, engine.model.fingerprint
    fill_source(region)
    ports = make_ports(
        settings.allowed_transports,
        region,
        registry,
        settings.host,
        settings.transport_port,
        settings.reachable_host,
        hub,
        secret,
        tls_files(settings),
    )
    me = LinkIdentity(worker_id, fingerprint, region.layout)
    verifier = Verifier(region, settings.verify, VerifyMetrics(registry), Random())
    with_digests, metrics, channels = verifier.wants_digests, LinkMetrics(registry), Channels()
    expectations = Expectations(settings.link_bytes_per_s_min)
    book = LinkBook(ports, me, secret, with_digests, metrics, clock, on_measured, expectations)
    links = Links(
        ports, me, secret, with_digests, channels.to, metrics, on_measured, clock, settings.link_bytes_per_s_min
    )
    fetch_servicer = FetchServicer(
        book,
        CachedBlocks(engine),
        fingerprint,
        region.layout,
        settings.transfer_bytes_in_flight_max,
        on_sent=on_sent,
    )
    fetcher = Fetcher(links, ports, channels.to, verifier, fingerprint, region.layout, clock)
    return Transfers(ports, book, fetch_servicer, links, fetcher, channels, verifier)


def read_secret(settings: WorkerSettings) -> bytes | None:
    """The cluster's; a warning where there is none. Raises SettingsError."""
    secret = cluster_secret(settings)
    if secret is None:
        log.warning("no cluster secret is set: whoever reaches this worker may exchange KV blocks with it")
    return secret


def tls_files(settings: WorkerSettings) -> TlsFiles | None:
    """For tcp. Raises SettingsError, naming the file, if one cannot be used: that must not turn up with the first
    request."""
    certificate, key = settings.transport_tls_certificate, settings.transport_tls_key
    authority = settings.transport_tls_authority
    if certificate is None or key is None or authority is None:
        return None
    files = TlsFiles(certificate, key, authority)
    try:
        TlsContexts(files, is_server=True).current()
    except TransferError as error:
        raise SettingsError(str(error)) from None
    return files
