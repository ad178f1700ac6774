"""The decode worker: reserves blocks, has them filled, and streams tokens to the routers."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence

from baton.clock import Clock, monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from baton.ids import BlockId, RequestId
from baton.rpc import common_pb2, worker_pb2, worker_pb2_grpc
from baton.rpc.convert import (
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_from_proto,
)
from baton.settings import DecodeWorkerSettings
from decode_worker.attempt import Filled
from decode_worker.fence import Fence, Unsettled
from decode_worker.prefill_client import PrefillCancelled, PrefillClient
from decode_worker.remote_prefill import PREFILL_ATTEMPTS_MAX, RemotePrefill
from decode_worker.request import ActiveRequest, Outbox
from decode_worker.session import DecodeServicer
from engine.interface import Admitted, EngineRequest, FinishReason, Generated, Prefill, StepResult
from engine.retention import retention_from_proto
from engine.worker.host import WorkerHost
from kvtransfer.inproc import InprocHub

log = logging.getLogger(__name__)

SERVICE = "baton.v1.DecodeWorker"

_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


class DecodeWorker:
    """One process's decode worker; lives on the asyncio loop that `start` is called on."""

    def __init__(self, settings: DecodeWorkerSettings, clock: Clock = monotonic, hub: InprocHub | None = None) -> None:
        """`hub` joins the workers of one process that allow the transport inproc."""
        self._settings, self._clock = settings, clock
        self._host = WorkerHost("decode", settings, self._on_result, clock=clock, hub=hub)
        self._requests: dict[RequestId, ActiveRequest] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> WorkerInfo:
        return self._host.info

    @property
    def address(self) -> str:
        return self._host.address

    async def start(self) -> None:
        """Returns when the model is loaded, the ports are open and the cluster knows."""
        await self._host.load()
        self._remote_prefill = self._make_remote_prefill()
        servicer = DecodeServicer(self)
        await self._host.serve(
            SERVICE, lambda server: worker_pb2_grpc.add_DecodeWorkerServicer_to_server(servicer, server)
        )

    def _make_remote_prefill(self) -> RemotePrefill:
        host, timeout_s = self._host, self._settings.prefill_timeout_s
        client = PrefillClient(host.channels.to, host.verifier, timeout_s)
        fence = Fence(host.ports, self._reclaim, host.registry)
        return RemotePrefill(host.model, host.ports, host.links, client, fence, timeout_s)

    async def failed(self) -> None:
        """Raises when the worker cannot serve any more, and its process should end."""
        await self._host.failed()

    async def drain(self) -> None:
        await self._host.drain(self._idle.wait)

    async def stop(self) -> None:
        await self._host.close_services()
        for request in list(self._requests.values()):
            self.cancel(request.request_id, request.outbox)
        if self._tasks:
            await asyncio.wait(self._tasks)
        if hasattr(self, "_remote_prefill"):
            await self._remote_prefill.close()
        await self._host.stop()

    # ---- from routers

    def submit(self, message: worker_pb2.Submit, outbox: Outbox) -> None:
        """Answers through the outbox alone, errors too."""
        self._host.arrived()
        request_id = RequestId(message.request_id)
        try:
            request = self._accept(request_id, message, outbox)
        except BatonError as error:
            outbox.put(_error_output(request_id, error))
            return
        self._requests[request_id] = request
        self._idle.clear()
        if request.deadline_s is not None:
            request.expiry = asyncio.get_running_loop().call_later(request.deadline_s, self._expire, request)
        self._spawn(request, self._add(request))

    def _accept(self, request_id: RequestId, message: worker_pb2.Submit, outbox: Outbox) -> ActiveRequest:
        if self._host.state == "draining":
            raise Unavailable(f"Decode worker {self._host.worker_id} is shutting down; use another.")
        if request_id in self._requests:
            raise InvalidRequest(f"Request id {request_id} is in use.", "request_id")
        sampling = sampling_from_proto(message.sampling)
        tells_prompt = sampling.prompt_logprobs is not None and not message.generated
        known_tokens = len(message.prompt) + len(message.generated)
        stays = (
            not message.prefill_candidates or tells_prompt or known_tokens <= self._settings.local_prefill_tokens_max
        )
        return ActiveRequest(
            request_id,
            tuple(message.prompt),
            tuple(message.generated),
            sampling,
            message.cache_salt,
            tuple(message.prefill_candidates[:PREFILL_ATTEMPTS_MAX]),
            outbox,
            self._clock,
            self._host.worker_id,
            Prefill.HERE if stays else Prefill.ELSEWHERE,
            message.deadline_s or None,
            retention_from_proto(message.retention),
            message.fetch if stays and message.HasField("fetch") else None,
        )

    async def _add(self, request: ActiveRequest) -> None:
        if request.fetch is not None:
            await self._prefetch(request, request.fetch)
        if request.cancelled.is_set():  # which forgot it
            return
        engine_request = EngineRequest(
            request.request_id,
            request.prompt,
            request.sampling,
            request.prefill,
            request.cache_salt,
            request.generated,
            request.retention,
        )
        try:
            await self._host.engine.call(lambda engine: engine.add(engine_request))
        except BatonError as error:
            self._finish(request, _error_output(request.request_id, error))
            return
        if request.cancelled.is_set():
            self._abort(request)

    async def _prefetch(self, request: ActiveRequest, plan: common_pb2.FetchPlan) -> None:
        request.fetch = None
        known = (*request.prompt, *request.generated)
        request.prefetched = await self._host.prefetcher.prefetch(
            request.request_id, plan, known, request.cache_salt, request.retention, request.cancelled
        )

    def cancel(self, request_id: RequestId, outbox: Outbox) -> None:
        """Forgets a request that came by this outbox; its blocks are free as soon as nobody writes into them."""
        request = self._requests.get(request_id)
        if request is not None and request.outbox is outbox:
            self._let_go(request)

    def _expire(self, request: ActiveRequest) -> None:
        if not request.cancelled.is_set():
            error = DeadlineExceeded(f"The request was not finished within its {request.deadline_s:g} s.")
            request.outbox.put(_error_output(request.request_id, error))
            self._let_go(request)

    def _let_go(self, request: ActiveRequest) -> None:
        """Idempotent. Nobody waits for it any more."""
        if request.cancelled.is_set():
            return
        request.cancelled.set()
        if request.remote_prefill is None:
            self._abort(request)

    def _abort(self, request: ActiveRequest) -> None:
        self._host.engine.post(lambda engine: engine.abort(request.request_id))
        self._forget(request)

    # ---- from the engine

    def _on_result(self, result: StepResult) -> None:
        for admitted in result.admitted:
            if request := self._requests.get(admitted.request_id):
                self._on_admitted(request, admitted)
        for generated in result.generated:
            if request := self._requests.get(generated.request_id):
                self._on_generated(request, generated)
        for failed in result.failed:
            if request := self._requests.get(failed.request_id):
                self._finish(request, _error_output(failed.request_id, failed.error))

    def _on_admitted(self, request: ActiveRequest, event: Admitted) -> None:
        request.admit(event)
        if request.prefill is Prefill.HERE or request.cancelled.is_set():
            return
        if request.known_tokens - event.cached_tokens <= self._settings.local_prefill_tokens_max:
            self._host.engine.post(lambda engine: engine.prefill_here(request.request_id))
        else:
            request.remote_prefill = self._spawn(request, self._prefill_remotely(request, event.blocks))

    def _on_generated(self, request: ActiveRequest, event: Generated) -> None:
        is_first = request.first_token_s is None
        if is_first:
            request.first_token_s = self._clock()
        output = worker_pb2.TokenOutput(
            request_id=request.request_id,
            token_ids=event.token_ids,
            logprobs=map(logprobs_to_proto, event.logprobs),
            prompt_logprobs=map(logprobs_to_proto, event.prompt_logprobs),
            finish_reason=_FINISH_REASONS[event.finish_reason],
            cached_tokens=request.tokens_not_computed,
            failed_prefill_workers=request.failed_prefill_workers if is_first else (),
        )
        if is_first or event.finish_reason is not None:
            output.timeline.CopyFrom(request.timeline(event))
        if event.finish_reason is None:
            request.outbox.put(output)
        else:
            self._finish(request, output)

    # ---- prefill elsewhere

    async def _prefill_remotely(self, request: ActiveRequest, blocks: Sequence[BlockId]) -> None:
        """Has the reserved blocks filled by the first candidate that can; else by this worker's own engine."""
        filled, unsettled = None, None
        try:
            filled = await self._remote_prefill.fill(request, blocks)
        except PrefillCancelled:
            pass
        except Unsettled as error:
            unsettled = error
        finally:
            request.remote_prefill = None
        if unsettled is not None:
            await self._begin_anew(request, blocks, unsettled)
            return
        if request.cancelled.is_set():
            self._abort(request)
        elif filled is None:
            self._host.engine.post(lambda engine: engine.prefill_here(request.request_id))
        else:
            self._commit(request, filled)

    def _commit(self, request: ActiveRequest, filled: Filled) -> None:
        commit = filled.commit
        self._host.transferred(commit.transfer_bytes, commit.transfer_s)
        logprobs = (logprobs_from_proto(commit.logprobs),) if commit.HasField("logprobs") else ()
        self._host.engine.post(
            lambda engine: engine.commit(request.request_id, commit.first_token, logprobs, filled.digests)
        )

    async def _begin_anew(self, request: ActiveRequest, blocks: Sequence[BlockId], unsettled: Unsettled) -> None:
        """In new blocks, because somebody may still write into these. Each time a candidate is used up, so it ends."""
        self._host.engine.post(lambda engine: engine.abandon(request.request_id))
        lacking = len(blocks) - request.cached_tokens // self._host.model.layout.block_tokens
        self._remote_prefill.fence.quarantine(request.request_id, lacking, unsettled)
        if request.cancelled.is_set():
            self._forget(request)
            return
        if not request.has_candidates:
            request.prefill = Prefill.HERE
        await self._add(request)

    def _reclaim(self, request_id: RequestId) -> None:
        self._host.engine.post(lambda engine: engine.reclaim(request_id))

    # ---- ends

    def _finish(self, request: ActiveRequest, output: worker_pb2.TokenOutput) -> None:
        if not request.cancelled.is_set():
            request.outbox.put(output)
        self._forget(request)

    def _forget(self, request: ActiveRequest) -> None:
        self._requests.pop(request.request_id, None)
        if request.expiry is not None:
            request.expiry.cancel()
        if not self._requests:
            self._idle.set()

    def cancel_all(self, outbox: Outbox) -> None:
        """The router that reads this outbox is gone."""
        for request in [r for r in self._requests.values() if r.outbox is outbox]:
            self.cancel(request.request_id, outbox)

    def _spawn(self, request: ActiveRequest, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(task: "asyncio.Task[None]") -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                log.error("request %s failed by a bug here", request.request_id, exc_info=error)
                self._host.engine.post(lambda engine: engine.abort(request.request_id))
                self._finish(request, _error_output(request.request_id, BatonError("The decode worker failed.")))

        task.add_done_callback(done)
        return task


def _error_output(request_id: RequestId, error: BatonError) -> worker_pb2.TokenOutput:
    kinds = {
        InvalidRequest: worker_pb2.ERROR_KIND_INVALID_REQUEST,
        Overloaded: worker_pb2.ERROR_KIND_OVERLOADED,
        Unavailable: worker_pb2.ERROR_KIND_UNAVAILABLE,
        DeadlineExceeded: worker_pb2.ERROR_KIND_DEADLINE_EXCEEDED,
    }
    return worker_pb2.TokenOutput(
        request_id=request_id,
        finish_reason=common_pb2.FINISH_REASON_ERROR,
        error=str(error),
        error_kind=next(
            (kind for cls, kind in kinds.items() if isinstance(error, cls)), worker_pb2.ERROR_KIND_INTERNAL
        ),
    )
