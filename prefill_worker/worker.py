"""The prefill worker: takes tickets from decode workers and answers each with KV blocks and a first token."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import TypeAlias

import grpc.aio

from baton.clock import Clock, monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Unavailable, UnsupportedModel
from baton.ids import RequestId
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.rpc.convert import layout_from_proto, sampling_from_proto
from baton.rpc.status_codes import status_code
from baton.rpc.streams import SerialWriter
from baton.settings import PrefillWorkerSettings
from engine.host import WorkerHost
from engine.interface import BlocksWritten, EngineRequest, Prefill, StepResult
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Offer
from kvtransfer.registry import make_ports
from prefill_worker.job import PrefillJob

log = logging.getLogger(__name__)

SERVICE = "baton.v1.PrefillWorker"


class PrefillWorker:
    """One process's prefill worker; lives on the asyncio loop that `start` is called on."""

    def __init__(self, settings: PrefillWorkerSettings, clock: Clock = monotonic, hub: InprocHub | None = None) -> None:
        """`hub` joins the workers of one process that allow the transport inproc."""
        self._settings, self._clock, self._hub = settings, clock, hub
        self._host = WorkerHost("prefill", settings, self._on_result, self._on_layer, clock)
        self._jobs: dict[RequestId, PrefillJob] = {}
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
        self._ports = make_ports(
            self._settings.allowed_transports, self._host.engine.region, self._host.registry, hub=self._hub
        )
        servicer = _Servicer(self)
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
        if hasattr(self, "_ports"):
            await self._ports.close()
        await self._host.stop()

    # ---- one ticket

    async def open_job(self, ticket: worker_pb2.Ticket) -> PrefillJob:
        """Connects to the decode worker and queues the prompt. Raises BatonError if either is refused."""
        self._host.arrived()
        if self._host.state == "draining":
            raise Unavailable("This prefill worker is shutting down; use another.")
        self._check(ticket)
        request_id = RequestId(f"{ticket.request_id}/{next(self._ticket_numbers)}")
        offers = [Offer(offer.transport, offer.descriptor) for offer in ticket.offers]
        connection = await self._ports.connect(RequestId(ticket.request_id), offers, layout_from_proto(ticket.layout))
        job = PrefillJob(request_id, ticket, connection, self._clock)
        self._jobs[request_id] = job
        self._idle.clear()
        try:
            request = EngineRequest(
                request_id,
                tuple(ticket.prompt),
                sampling_from_proto(ticket.sampling),
                Prefill.ONLY,
                ticket.cache_salt,
                tuple(ticket.generated),
            )
            await self._host.engine.call(lambda engine: engine.add(request))
        except BaseException:
            await self.close_job(job)
            raise
        return job

    def _check(self, ticket: worker_pb2.Ticket) -> None:
        own = self._host.model
        if ticket.fingerprint != own.fingerprint:
            raise UnsupportedModel(
                "The ticket's model, weights or dtype are not this prefill worker's; their KV blocks must not mix."
            )
        if not own.layout.is_compatible(layout_from_proto(ticket.layout)):
            raise UnsupportedModel("The ticket's KV layout (block size, heads or dtype) is not this prefill worker's.")
        if ticket.first_block + len(ticket.blocks) != own.layout.blocks_for(len(ticket.prompt) + len(ticket.generated)):
            raise InvalidRequest("The ticket's blocks do not cover its prompt.", "blocks")

    async def close_job(self, job: PrefillJob, *, sent: bool = False) -> None:
        """After it returns no slice of the ticket is written, and the engine's blocks are free or cached.

        Once begun it is carried through, whoever cancels: a decode worker hangs up as soon as it has its commit.
        """
        closing = asyncio.ensure_future(self._let_go(job, sent))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    async def _let_go(self, job: PrefillJob, sent: bool) -> None:
        await job.connection.close()
        if sent:
            self._host.transferred(job.connection.bytes_written, job.connection.busy_s)
            self._host.engine.post(lambda engine: engine.release(job.request_id))
        else:
            self._host.engine.post(lambda engine: engine.abort(job.request_id))
        self._jobs.pop(job.request_id, None)
        if not self._jobs:
            self._idle.set()

    def timeout_s(self, ticket: worker_pb2.Ticket) -> float:
        """The shorter of the ticket's own, where it has one, and this worker's."""
        return min(ticket.deadline_s or self._settings.prefill_timeout_s, self._settings.prefill_timeout_s)

    # ---- from the engine

    def _on_layer(self, layer: int, written: Sequence[BlocksWritten]) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch_layer, layer, written)

    def _dispatch_layer(self, layer: int, written: Sequence[BlocksWritten]) -> None:
        for event in written:
            if job := self._jobs.get(event.request_id):
                job.written(layer, event)

    def _on_result(self, result: StepResult) -> None:
        for admitted in result.admitted:
            if job := self._jobs.get(admitted.request_id):
                job.admitted(admitted)
        for generated in result.generated:
            if job := self._jobs.get(generated.request_id):
                job.generated(generated)
        for failed in result.failed:
            if job := self._jobs.get(failed.request_id):
                job.failed(failed)


Respond = SerialWriter[worker_pb2.PrefillResponse]
PrefillContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]"


class _Servicer(worker_pb2_grpc.PrefillWorkerServicer):
    """Each call is one ticket; the call's stream is the lease on it."""

    def __init__(self, worker: PrefillWorker) -> None:
        self._worker = worker

    async def Prefill(  # noqa: N802 - gRPC's name
        self, request_iterator: object, context: PrefillContext
    ) -> None:
        del request_iterator  # read through the context, which knows the end of the stream
        try:
            first = await context.read()
            if not isinstance(first, worker_pb2.PrefillRequest) or first.WhichOneof("message") != "ticket":
                raise InvalidRequest("The first message of a Prefill stream must be a ticket.")
            job = await self._worker.open_job(first.ticket)
            respond = Respond(context.write)
            if not await self._run(job, context, respond, self._worker.timeout_s(first.ticket)):
                await respond(worker_pb2.PrefillResponse(released=worker_pb2.PrefillReleased()))
        except BatonError as error:
            await context.abort(status_code(error), str(error))

    async def _run(self, job: PrefillJob, context: PrefillContext, respond: Respond, timeout_s: float) -> bool:
        """Whether the commit was sent; false: the decode worker took the ticket back."""
        work = asyncio.ensure_future(self._prefill(job, respond))
        taken_back = asyncio.ensure_future(context.read())
        committed = False
        try:
            done, _ = await asyncio.wait({work, taken_back}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"The ticket was not done within {timeout_s:g} s.")
            if work in done:
                work.result()
                committed = True
        finally:
            for task in (work, taken_back):
                task.cancel()
            await self._worker.close_job(job, sent=committed)
            await asyncio.gather(work, taken_back, return_exceptions=True)
        return committed

    @staticmethod
    async def _prefill(job: PrefillJob, respond: Respond) -> None:
        await respond(worker_pb2.PrefillResponse(started=await job.started()))
        await job.send()
        await respond(worker_pb2.PrefillResponse(commit=await job.commit()))
