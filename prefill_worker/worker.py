"""The prefill worker: takes tickets from decode workers and answers each with KV blocks and a first token."""

import asyncio
import itertools
import logging
from collections.abc import Sequence

from baton.clock import Clock, monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.errors import InvalidRequest, Unavailable, UnsupportedModel
from baton.ids import RequestId
from baton.layout import KVLayout
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.rpc.convert import layout_from_proto, sampling_from_proto
from baton.settings import PrefillWorkerSettings
from engine.interface import BlocksWritten, EngineRequest, Prefill, StepResult
from engine.retention import retention_from_proto
from engine.worker.host import WorkerHost
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Offer
from prefill_worker.gather import Layer, LayerGatherer
from prefill_worker.job import PrefillJob, Sending
from prefill_worker.metrics import SendMetrics
from prefill_worker.recut import Recut
from prefill_worker.servicer import PrefillServicer

log = logging.getLogger(__name__)

SERVICE = "baton.v1.PrefillWorker"


class PrefillWorker:
    """One process's prefill worker; lives on the asyncio loop that `start` is called on."""

    def __init__(self, settings: PrefillWorkerSettings, clock: Clock = monotonic, hub: InprocHub | None = None) -> None:
        """`hub` joins the workers of one process that allow the transport inproc."""
        self._settings, self._clock = settings, clock
        self._host = WorkerHost("prefill", settings, self._on_result, self._on_layer, clock, hub=hub)
        self._metrics = SendMetrics(self._host.registry)
        self._sending = Sending(
            settings.transfer_bytes_in_flight_max,
            after_prefill=settings.send == "after_prefill",
            makes_digests=settings.verify != "never",
        )
        self._feeds: dict[RequestId, PrefillJob | Recut] = {}
        """What takes the engine's events."""
        self._closing: set[asyncio.Future[None]] = set()
        self._ticket_numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> WorkerInfo:
        return self._host.info

    @property
    def address(self) -> str:
        return self._host.address

    async def start(self) -> None:
        """Returns when the model is loaded, the port is open and the cluster knows."""
        self._loop = asyncio.get_running_loop()
        await self._host.load()
        self._gatherer = LayerGatherer(self._host.model.layout, self._deliver)
        servicer = PrefillServicer(self)
        await self._host.serve(
            SERVICE, lambda server: worker_pb2_grpc.add_PrefillWorkerServicer_to_server(servicer, server)
        )

    async def failed(self) -> None:
        """Raises when the worker cannot serve any more, and its process should end."""
        await self._host.failed()

    async def drain(self) -> None:
        await self._host.drain(self._idle.wait)

    async def stop(self) -> None:
        await self._host.close_services()
        await asyncio.gather(*self._closing)
        await self._host.stop()

    # ---- one ticket

    async def open_job(self, ticket: worker_pb2.Ticket) -> PrefillJob:
        """Connects to the decode worker. Raises BatonError if that or the ticket is refused."""
        self._host.arrived()
        if self._host.state == "draining":
            raise Unavailable("This prefill worker is shutting down; use another.")
        peer = self._host.link_book.check(ticket)
        self._check(ticket, peer.layout)
        request_id = RequestId(f"{ticket.request_id}/{next(self._ticket_numbers)}")
        offers = [Offer(offer.transport, offer.descriptor) for offer in ticket.offers]
        connection = await self._host.link_book.connect(peer, request_id, offers)
        job = PrefillJob(request_id, ticket, connection, self._sending, self._clock)
        self._feeds[request_id] = self._feed(job, ticket, peer.layout)
        self._idle.clear()
        return job

    async def begin_job(self, job: PrefillJob, ticket: worker_pb2.Ticket) -> None:
        """Raises BatonError if the engine takes no more."""
        retention = retention_from_proto(ticket.retention)
        if ticket.HasField("fetch"):
            known = (*ticket.prompt, *ticket.generated)
            prefetched = await self._host.prefetcher.prefetch(
                job.request_id, ticket.fetch, known, ticket.cache_salt, retention, asyncio.Event()
            )
            job.prefetched(prefetched)
        request = EngineRequest(
            job.request_id,
            tuple(ticket.prompt),
            sampling_from_proto(ticket.sampling),
            Prefill.ONLY,
            ticket.cache_salt,
            tuple(ticket.generated),
            retention,
        )
        await self._host.engine.call(lambda engine: engine.add(request))

    def _feed(self, job: PrefillJob, ticket: worker_pb2.Ticket, target: KVLayout) -> PrefillJob | Recut:
        region = self._host.engine.region
        if region.layout.is_compatible(target):
            return job
        tokens = len(ticket.prompt) + len(ticket.generated)
        return Recut(job, region, target, tokens, ticket.first_block, self._clock)

    def _check(self, ticket: worker_pb2.Ticket, target: KVLayout) -> None:
        """`target` is what the link's receiver said its region is."""
        own = self._host.model
        if ticket.fingerprint != own.fingerprint:
            raise UnsupportedModel(
                "The ticket's model, weights or dtype are not this prefill worker's; their KV blocks must not mix."
            )
        if layout_from_proto(ticket.layout) != target:
            raise InvalidRequest("The ticket's KV layout is not that of its link.", "layout")
        if any(block >= target.pool_blocks for block in ticket.blocks):
            raise InvalidRequest("The ticket names blocks that the region does not have.", "blocks")
        if ticket.first_block + len(ticket.blocks) != target.blocks_for(len(ticket.prompt) + len(ticket.generated)):
            raise InvalidRequest("The ticket's blocks do not cover its prompt.", "blocks")

    async def close_job(self, job: PrefillJob) -> None:
        """After it returns no slice of the ticket is written, and the engine's blocks are free or cached.

        Once begun it is carried through, whoever cancels: a decode worker may hang up at any moment.
        """
        closing = asyncio.ensure_future(self._let_go(job))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    async def _let_go(self, job: PrefillJob) -> None:
        await job.connection.close()
        feed = self._feeds.get(job.request_id)
        if isinstance(feed, Recut):
            await feed.close()
        if job.is_committed:
            self._host.transferred(job.times.bytes, job.times.busy_s)
            self._metrics.sent(job.connection.transport, job.times)
            self._host.engine.post(lambda engine: engine.release(job.request_id))
        else:
            self._host.engine.post(lambda engine: engine.abort(job.request_id))
        self._feeds.pop(job.request_id, None)
        if not self._feeds:
            self._idle.set()

    def timeout_s(self, ticket: worker_pb2.Ticket) -> float:
        """The shorter of the ticket's own, where it has one, and this worker's."""
        return min(ticket.deadline_s or self._settings.prefill_timeout_s, self._settings.prefill_timeout_s)

    # ---- from the engine

    def _on_layer(self, layer: int, written: Sequence[BlocksWritten]) -> None:
        """On the engine's thread."""
        self._gatherer.written(layer, written)

    def _deliver(self, layers: Sequence[Layer]) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, layers)

    def _dispatch(self, layers: Sequence[Layer]) -> None:
        for layer, written in layers:
            for event in written:
                if feed := self._feeds.get(event.request_id):
                    feed.written(layer, event)

    def _on_result(self, result: StepResult) -> None:
        for admitted in result.admitted:
            if feed := self._feeds.get(admitted.request_id):
                feed.admitted(admitted)
        for digested in result.digested:
            if feed := self._feeds.get(digested.request_id):
                feed.digested(digested)
        for generated in result.generated:
            if feed := self._feeds.get(generated.request_id):
                feed.generated(generated)
        for failed in result.failed:
            if feed := self._feeds.get(failed.request_id):
                feed.failed(failed)
