"""The router: its parts put together, started and stopped."""

import asyncio
import logging
import secrets
import time
from pathlib import Path

from prometheus_client import CollectorRegistry

from baton.clock import Clock, monotonic
from baton.service import GrpcService
from baton.settings import RouterSettings
from router.admission import Admission
from router.frontend import SEED_BITS, Frontend
from router.generation import Generator
from router.grpc_api import SERVICE, InferenceService
from router.http_api import make_http_app
from router.http_server import HttpServer
from router.metrics import RouterMetrics, WorkerCollector
from router.prompts import PromptEncoder
from router.tokenizer import TextThreads, Tokenizer
from router.worker_pool import Membership, WorkerPool

log = logging.getLogger(__name__)


class Router:
    """One process's front door; lives on the asyncio loop that `start` is called on.

    `model_directory` holds the tokenizer and chat template of `settings.model`. The membership stays the
    caller's: started before, closed after.
    """

    def __init__(
        self,
        settings: RouterSettings,
        membership: Membership,
        model_directory: Path,
        registry: CollectorRegistry | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """Raises SettingsError if the tokenizer cannot be loaded."""
        self._settings = settings
        registry = registry or CollectorRegistry()
        metrics = RouterMetrics(registry, settings.model_name)
        registry.register(WorkerCollector(membership.workers))
        tokenizer = Tokenizer.load(model_directory, trust_remote_code=settings.trust_remote_code)
        self._threads = TextThreads()
        self._pool = WorkerPool(membership, settings.model_name)
        self._admission = Admission(settings.requests_max)
        frontend = Frontend(
            settings,
            self._admission,
            PromptEncoder(tokenizer, self._threads, settings.prompt_bytes_max),
            Generator(settings.model_name, tokenizer, self._pool, metrics, clock, settings.request_timeout_s),
            metrics,
            clock,
            time.time,
            lambda: secrets.randbits(SEED_BITS),
        )
        app = make_http_app(frontend, registry)
        self._http = HttpServer(app, settings.host, settings.http_port, settings.drain_timeout_s)
        self._grpc = GrpcService(settings.host, settings.grpc_port, [SERVICE], settings.body_bytes_max)
        self._inference = InferenceService(frontend)
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
        return self._pool.is_ready and not self._admission.is_closed

    async def ready(self) -> None:
        """Returns when a request could be served."""
        while not self._pool.is_ready:
            await self._pool.changed()

    async def start(self) -> None:
        """Returns when both ports are open. Raises SettingsError if one cannot be had; `stop` is then still due."""
        await self._pool.start()
        await self._grpc.start(self._inference.register)
        await self._http.start()
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
        await self._pool.stop()  # what still runs ends with an error that its client can read
        await asyncio.gather(self._http.stop(), self._grpc.stop())
        self._threads.close()

    async def _follow_readiness(self) -> None:
        while True:
            is_ready = self.is_ready
            await self._grpc.set_serving(is_ready)
            while self.is_ready == is_ready:
                await self._pool.changed()
