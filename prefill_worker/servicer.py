"""The gRPC service of prefill workers: each call is one ticket, and the call's stream is the lease on it."""

import asyncio
from typing import Protocol, TypeAlias

import grpc.aio

from baton.errors import BatonError, DeadlineExceeded, InvalidRequest
from baton.rpc import transfer_pb2, worker_pb2, worker_pb2_grpc
from baton.rpc.status_codes import status_code
from baton.rpc.streams import SerialWriter
from prefill_worker.job import PrefillJob

Respond = SerialWriter[worker_pb2.PrefillResponse]
PrefillContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]"


class Jobs(Protocol):
    """What the worker does about tickets."""

    async def open_job(self, ticket: worker_pb2.Ticket) -> PrefillJob:
        """Raises BatonError if the ticket is refused."""

    async def begin_job(self, job: PrefillJob, ticket: worker_pb2.Ticket) -> None:
        """Fetches what the ticket's plan says and queues the prompt. Raises BatonError if that is refused. May be
        cancelled, before `close_job`."""

    async def close_job(self, job: PrefillJob) -> None:
        """After it returns no slice of the ticket is written, and the engine's blocks are free or cached."""

    def timeout_s(self, ticket: worker_pb2.Ticket) -> float: ...


class PrefillServicer(worker_pb2_grpc.PrefillWorkerServicer):
    """A ticket ends when the decode worker ends its side of the stream after the commit, takes the ticket back, hangs
    up or dies; when the job fails; or with its deadline. Each time its blocks are let go first."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def Prefill(  # noqa: N802 - gRPC's name
        self, request_iterator: object, context: PrefillContext
    ) -> None:
        del request_iterator  # read through the context, which knows the end of the stream
        try:
            first = await context.read()
            if not isinstance(first, worker_pb2.PrefillRequest) or first.WhichOneof("message") != "ticket":
                raise InvalidRequest("The first message of a Prefill stream must be a ticket.")
            job = await self._jobs.open_job(first.ticket)
            respond = Respond(context.write)
            await self._run(job, first.ticket, context, respond)
            if not job.is_committed:
                await respond(worker_pb2.PrefillResponse(released=worker_pb2.PrefillReleased()))
        except BatonError as error:
            await context.abort(status_code(error), str(error))

    async def _run(self, job: PrefillJob, ticket: worker_pb2.Ticket, context: PrefillContext, respond: Respond) -> None:
        """Until the decode worker wants no more of it. Raises what failed, or DeadlineExceeded."""
        timeout_s = self._jobs.timeout_s(ticket)
        serving = asyncio.ensure_future(self._serve(job, ticket, respond))
        tasks = {serving, asyncio.ensure_future(_listen(job, context))}
        try:
            done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"The ticket was not done within {timeout_s:g} s.")
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await self._jobs.close_job(job)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, job: PrefillJob, ticket: worker_pb2.Ticket, respond: Respond) -> None:
        """Until cancelled."""

        async def tell(landed: transfer_pb2.BlocksLanded) -> None:
            await respond(worker_pb2.PrefillResponse(landed=landed))

        await self._jobs.begin_job(job, ticket)
        await respond(worker_pb2.PrefillResponse(started=await job.started()))
        await job.send(tell)
        await respond(worker_pb2.PrefillResponse(commit=job.commit()))
        job.is_committed = True
        await job.send_again(tell)


async def _listen(job: PrefillJob, context: PrefillContext) -> None:
    """Until the decode worker takes the ticket back or ends its side. Raises InvalidRequest."""
    while isinstance(request := await context.read(), worker_pb2.PrefillRequest):
        match request.WhichOneof("message"):
            case "resend":
                job.resend(request.resend.indices)
            case "cancel":
                return
            case _:
                raise InvalidRequest("A Prefill stream has one ticket.")
