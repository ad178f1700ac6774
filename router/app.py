"""The router: its parts put together, started and stopped."""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from baton.clock import Clock, monotonic
from baton.service import GrpcService
from baton.settings import RouterSettings
from router.admission.admission import Admission
from router.admission.metrics import AdmissionMetrics
from router.admission.tenancy import Tenancy
from router.catalog import load_catalog
from router.cluster_view import ClusterView
from router.frontend import SEED_BITS, Frontend
from router.generation import Generator
from router.grpc_api import SERVICE, InferenceService
from router.http.api import make_http_app
from router.http.server import HttpServer
from router.index.metrics import IndexCollector
from router.metrics import ModelMetrics, RouterMetrics, WorkerCollector
from router.peers import Peers
from router.placement.decision_log import DecisionLog
from router.text.tokenizer import TextThreads, Tokenizer
from router.worker_pool import Membership

log = logging.getLogger(__name__)


class Router:
    """One process's front door; lives on the asyncio loop that `start` is called on.

    `directories` says where the tokenizers and chat templates of the models lie, each by its setting `model`. The
    membership and the Redis client stay the caller's: started before, closed after. Without Redis the router is on its
    own, and knows of the workers' caches what it itself sent there.
    """

    def __init__(
        self,
        settings: RouterSettings,
        membership: Membership,
        directories: Mapping[str, Path],
        registry: CollectorRegistry | None = None,
        clock: Clock = monotonic,
        redis: Redis | None = None,
    ) -> None:
        """Raises SettingsError if a tokenizer cannot be loaded, or the tenants' file not be used."""
        self._settings = settings
        registry = registry or CollectorRegistry()
        metrics, admission_metrics = RouterMetrics(registry), AdmissionMetrics(registry)
        registry.register(WorkerCollector(membership.workers))
        router_id = f"router-{secrets.token_hex(4)}"
        self._threads = TextThreads()
        self._cluster = cluster = ClusterView(settings, membership, redis, router_id, clock)
        if cluster.feed is not None:
            registry.register(IndexCollector(cluster.index, cluster.feed))
        self._tenancy = Tenancy(settings, redis, router_id, admission_metrics, clock)
        self._admission = Admission(settings, cluster.placer, admission_metrics, clock, self._tenancy.limits)
        decisions = DecisionLog(settings.decisions_max, router_id, time.time)

        def make_generator(model: str, tokenizer: Tokenizer, metrics: ModelMetrics) -> Generator:
            return Generator(
                model,
                tokenizer,
                cluster.pool,
                cluster.placer,
                decisions,
                cluster.cooldowns,
                metrics,
                clock,
                settings.request_timeout_s,
                settings.failover_max,
                settings.failover_wait_s,
                partial(self._admission.poke, model),
            )

        self._catalog = load_catalog(settings, directories, self._threads, make_generator, metrics.of)
        self._frontend = Frontend(
            settings,
            self._tenancy.tenants,
            self._admission,
            self._catalog,
            cluster,
            decisions.get,
            Peers(cluster.peers).decision,
            metrics,
            clock,
            time.time,
            lambda: secrets.randbits(SEED_BITS),
        )
        app = make_http_app(self._frontend, registry)
        self._http = HttpServer(app, settings.host, settings.http_port, settings.drain_timeout_s)
        self._grpc = GrpcService(settings.host, settings.grpc_port, [SERVICE], settings.body_bytes_max)
        self._inference = InferenceService(self._frontend)
        self._readiness: asyncio.Task[None] | None = None

    @property
    def http_address(self) -> str:
        """HOST:PORT that others reach it at."""
        return f"{self._settings.reachable_host}:{self._http.port}"

    @property
    def grpc_address(self) -> str:
        return f"{self._settings.reachable_host}:{self._grpc.port}"

    @property
    def is_ready(self) -> bool:
        """Whether a request could be served now."""
        return self._frontend.unready() is None

    async def ready(self) -> None:
        """Returns when a request could be served."""
        while not self.is_ready:
            await self._cluster.pool.changed()

    async def start(self) -> None:
        """Returns when both ports are open; `ready` somewhat later.

        Raises SettingsError if a port cannot be had, ClusterError if Redis does not answer; `stop` is then still due.
        """
        await self._grpc.start(self._inference.register)
        await self._http.start()
        await self._tenancy.start(self._admission)
        await self._cluster.start(self.grpc_address, self.http_address)
        self._readiness = asyncio.create_task(self._follow_readiness(), name="follow readiness")
        log.info("listening at http://%s, gRPC %s", self.http_address, self.grpc_address)

    async def drain(self) -> None:
        """Admits nothing new, then waits for what runs, `drain_timeout_s` at most."""
        self._admission.close()
        await self._grpc.set_serving(False)
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._admission.idle()
        except TimeoutError:
            log.warning("requests still ran after %g s of draining", self._settings.drain_timeout_s)

    async def stop(self) -> None:
        """Idempotent, and right at any point of a start that failed. Cancels what still runs."""
        self._admission.close()
        if self._readiness is not None:
            self._readiness.cancel()
            await asyncio.gather(self._readiness, return_exceptions=True)
        await self._cluster.close()  # what still runs ends with an error that its client can read
        await asyncio.gather(self._http.stop(), self._grpc.stop())
        await self._tenancy.close()
        await self._catalog.close()
        self._threads.close()

    async def _follow_readiness(self) -> None:
        while True:
            is_ready = self.is_ready
            await self._grpc.set_serving(is_ready)
            while self.is_ready == is_ready:
                await self._cluster.pool.changed()
