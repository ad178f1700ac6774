"""What prefill and decode workers share: an engine on its thread, a gRPC server, membership, status."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry, start_http_server

from baton.clock import Clock, monotonic
from baton.cluster.cache_events import CacheChanges
from baton.cluster.membership import Membership
from baton.cluster.redis_client import connect_redis
from baton.cluster.worker_info import Role, State, WorkerInfo
from baton.errors import SettingsError, Unavailable
from baton.ids import BlockHash, WorkerId, new_worker_id
from baton.rpc import transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.rpc.channels import Channels
from baton.service import GrpcService
from baton.settings import WorkerSettings
from engine.core import LocalEngine
from engine.interface import Engine, LayerListener, ModelInfo, StepResult
from engine.opening import load_engine
from engine.thread import EngineThread
from engine.worker.arrival_rate import ArrivalRate
from engine.worker.cache_admin import CacheAdmin
from engine.worker.cluster_cache import ClusterCache
from engine.worker.engine_metrics import EngineMetrics
from engine.worker.figures import load_of, status_of
from engine.worker.prefetch import Prefetcher
from engine.worker.prefetch_metrics import PrefetchMetrics
from engine.worker.speed import MeasuredSpeed
from engine.worker.tier_metrics import TierMetrics, watch
from engine.worker.transfer_servicer import SERVICE as TRANSFER_SERVICE
from engine.worker.transfer_servicer import TransferServicer
from engine.worker.transfers import open_transfers, read_secret
from engine.worker.worker_servicer import WorkerServicer
from kvtransfer.inproc import InprocHub
from kvtransfer.link.client import Links
from kvtransfer.link.servicer import LinkBook
from kvtransfer.registry import Ports
from kvtransfer.verify import Verifier

log = logging.getLogger(__name__)

SETTLE_POLL_S = 0.02


class WorkerHost:
    """A worker without its role.

    The role gives `on_result` (called on the loop with each engine step's outcome), optionally a layer
    listener (called on the engine thread), and registers its own gRPC service at `serve`. It tells of each request
    that arrives, and of each transfer; what engine steps say about the worker's speed and its prefix cache is seen to
    here.
    """

    def __init__(
        self,
        role: Role,
        settings: WorkerSettings,
        on_result: Callable[[StepResult], None],
        layer_listener: LayerListener | None = None,
        clock: Clock = monotonic,
        hub: InprocHub | None = None,
    ) -> None:
        """`hub` joins the workers of one process that allow the transport inproc."""
        self.role, self.settings = role, settings
        self.worker_id = WorkerId(settings.worker_id) if settings.worker_id else new_worker_id(role)
        self.state: State = "starting"
        self.registry = CollectorRegistry()
        self._on_result, self._layer_listener = on_result, layer_listener
        self._clock, self._hub = clock, hub
        self._epoch = secrets.token_hex(8)
        self._speed = MeasuredSpeed(self.registry, role, settings.model_name, settings.chunk_tokens)
        self._tier_metrics = TierMetrics(self.registry, lambda: self.engine.stats())
        self._arrivals = ArrivalRate(clock)
        self._cache: ClusterCache[LocalEngine[Any]] | None = None
        self._untold: list[CacheChanges] = []
        self._exits: list[Callable[[], object]] = []

    async def load(self) -> None:
        """Loads the model and allocates the pool and the tiers below it, on the engine's thread. Raises as
        load_engine does, and SettingsError for a cluster secret or transports that cannot be used."""
        secret = read_secret(self.settings)
        self.engine = EngineThread(
            lambda: load_engine(self.settings, self._layer_listener),
            self._take,
            asyncio.get_running_loop(),
        )
        await self.engine.started()
        self.model: ModelInfo = self.engine.model
        EngineMetrics(self.registry, self.role, self.model.name, self.engine.stats)
        self._transfers = open_transfers(
            self.settings,
            secret,
            self.worker_id,
            self.engine,
            self.registry,
            self._speed.tested_link,
            self.transferred,
            self._hub,
            self._clock,
        )
        self.prefetcher = self._make_prefetcher()
        if self.settings.self_test:
            await self._speed.self_test(self.engine)
        await self.engine.call(self._give_latency)

    def _make_prefetcher(self) -> Prefetcher[LocalEngine[Any]]:
        return Prefetcher(
            self.worker_id,
            self.engine,
            self._transfers.fetcher,
            self._speed,
            PrefetchMetrics(self.registry),
            self.transferred,
            self._pin,
            is_on=self.settings.fetch,
            clock=self._clock,
        )

    def _give_latency(self, engine: LocalEngine[Any]) -> None:
        """By which it decides what to restore and what to recompute."""
        engine.latency = lambda: self._speed.latency

    # ---- KV to and from other workers, after `load`

    @property
    def ports(self) -> Ports:
        return self._transfers.ports

    @property
    def link_book(self) -> LinkBook:
        """Of those that this worker sends to."""
        return self._transfers.link_book

    @property
    def links(self) -> Links:
        """To those that it receives from."""
        return self._transfers.links

    @property
    def verifier(self) -> Verifier:
        return self._transfers.verifier

    @property
    def channels(self) -> Channels:
        return self._transfers.channels

    # ---- the start

    async def serve(self, service: str, register: Callable[[grpc.aio.Server], None]) -> None:
        """Starts to listen, and announces the worker as ready."""
        settings = self.settings
        redis = await connect_redis(settings.redis_url)
        self._exits.append(redis.aclose)
        self._cache = ClusterCache(redis, settings.key_prefix, self.worker_id, self._epoch, self.engine)
        while self._untold:
            self._cache.record(self._untold.pop(0))
        await self._cache.start(has_tiers=settings.ddr_bytes > 0)
        self._exits.append(self._cache.close)
        watching = asyncio.create_task(watch(self.engine, self._tier_metrics), name="watch tiers")
        self._exits.append(lambda: _cancelled(watching))
        self._grpc = GrpcService(settings.host, settings.grpc_port, [service, "baton.v1.Worker", TRANSFER_SERVICE])

        admin = CacheAdmin(
            self.worker_id, self.engine, lambda: self._speed.latency, lambda: self.prefetcher.fetched_tokens
        )

        def register_all(server: grpc.aio.Server) -> None:
            register(server)
            servicer = WorkerServicer(self.status, self.cache_snapshot, admin)
            worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)
            transfers = TransferServicer(self.link_book, self._transfers.fetch_servicer)
            transfer_pb2_grpc.add_TransferServicer_to_server(transfers, server)

        await self._grpc.start(register_all)
        self._exits.append(self._grpc.stop)
        self._exits.append(self._transfers.close_links)
        if settings.metrics_port is not None:
            self._serve_metrics(settings.metrics_port)
        self.state = "ready"
        self._membership = Membership(redis, settings.key_prefix, lambda: self.info)
        await self._membership.start()
        self._exits.append(self._membership.close)
        await self._grpc.set_serving(True)
        log.info("%s ready at %s, %d KV blocks", self.worker_id, self.address, self.engine.stats().kv_blocks_total)

    def _serve_metrics(self, port: int) -> None:
        try:
            server, thread = start_http_server(port, self.settings.host, self.registry)
        except OSError as error:
            raise SettingsError(f"The metrics port {port} cannot be listened on: {error.strerror}.") from None

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._exits.append(close)

    # ---- what is measured, and what changes

    def _take(self, result: StepResult) -> None:
        if timing := result.timing:
            self._speed.stepped(timing)
        for restored in result.restored:
            self._speed.restored(restored)
            self._tier_metrics.restored(restored)
        self._record(result.cache_changes)
        self._on_result(result)

    def _record(self, changes: CacheChanges) -> None:
        """What happens before `serve` - a tier's index may be filled from its file by then - is told there."""
        if self._cache is None:
            self._untold.append(changes)
        else:
            self._cache.record(changes)

    async def _pin(self, names: Sequence[BlockHash], holder: WorkerId, ttl_s: float) -> None:
        if self._cache is not None:
            await self._cache.pin(names, holder, ttl_s)

    def arrived(self) -> None:
        """A request came, whatever becomes of it."""
        self._arrivals.arrived()

    def transferred(self, size_bytes: int, seconds: float) -> None:
        """KV of one request was moved between this worker and another."""
        if size_bytes:
            self._speed.transferred(size_bytes, seconds)

    def cache_snapshot(self) -> Iterator[worker_pb2.CacheSnapshot]:
        """After `serve`. Of this moment, however slowly it is read."""
        assert self._cache is not None
        return self._cache.snapshot()

    # ---- how it is

    @property
    def address(self) -> str:
        return f"{self.settings.reachable_host}:{self._grpc.port}"

    @property
    def info(self) -> WorkerInfo:
        stats, layout = self.engine.stats(), self.model.layout
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            state=self.state,
            address=self.address,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            context_length=self.model.context_length,
            vocabulary_size=self.model.vocabulary_size,
            block_tokens=layout.block_tokens,
            kv_dtype=layout.dtype,
            kv_blocks_total=stats.kv_blocks_total,
            kv_block_bytes=layout.block_bytes,
            layers=layout.layers,
            chunk_tokens=self.settings.chunk_tokens,
            sequences_max=self.settings.sequences_max,
            pool=self.settings.pool,
            fetches=self.settings.fetch,
            latency=self._speed.latency,
            epoch=self._epoch,
            cache_sequence=self._cache.sequence if self._cache else 0,
            load=load_of(stats, self._arrivals.per_s),
        )

    async def failed(self) -> None:
        """Raises what ended the engine, as soon as something has: then the worker cannot serve any more and its
        process should end. Returns only after `stop`."""
        await self.engine.ended()

    async def drain(self, until_idle: Callable[[], Awaitable[object]]) -> None:
        """Tells the cluster to send nothing new, then waits for what runs and for what is on its way down to lower
        tiers, where the next process on the same file finds it; `drain_timeout_s` at most."""
        self.state = "draining"
        await self._grpc.set_serving(False)
        await self._membership.announce()
        try:
            async with asyncio.timeout(self.settings.drain_timeout_s):
                await until_idle()
                while not await self.engine.call(_is_settled):  # noqa: ASYNC110 - tiers tell nobody when they rest
                    await asyncio.sleep(SETTLE_POLL_S)
        except TimeoutError:
            log.warning("%s still had work after %g s of draining", self.worker_id, self.settings.drain_timeout_s)
        except Unavailable:
            return  # the engine has ended: `failed` says why

    async def close_services(self) -> None:
        """Leaves the cluster, and ends its links and the calls that are still open. Idempotent."""
        while self._exits:
            outcome = self._exits.pop()()
            if asyncio.iscoroutine(outcome):
                await outcome

    async def stop(self) -> None:
        """Idempotent, and right at any point of a start that failed. When nobody uses `ports` any more."""
        await self.close_services()
        if hasattr(self, "prefetcher"):
            await self.prefetcher.close()
        if hasattr(self, "_transfers"):
            await self._transfers.close()
        if hasattr(self, "engine"):
            await self.engine.stop()

    def status(self) -> worker_pb2.WorkerStatus:
        return status_of(self.worker_id, self.role, self.model.name, self.state, self.engine.stats())


def _is_settled(engine: Engine) -> bool:
    return not engine.has_work and (engine.tiers is None or engine.tiers.is_settled)


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
