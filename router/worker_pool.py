"""Streams to the decode workers: one for each, kept open while it is a member, shared by all requests."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import grpc.aio

from baton.clock import Clock, monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.errors import Unavailable
from baton.ids import RequestId, WorkerId
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RECONNECT_DELAYS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Between attempts to reach a worker that is a member; the last one for ever after."""
MEMBERSHIP_WAIT_MAX_S = 5.0


class Membership(Protocol):
    """Who is in the cluster (baton.cluster.membership.MembershipWatch, or a list)."""

    def workers(self) -> Sequence[WorkerInfo]: ...

    async def changed(self) -> None:
        """Returns when `workers` differs from what it was at the call."""


class WorkerLost(Unavailable):
    """The stream to a decode worker broke, and with it the requests on it."""

    def __init__(self, worker_id: WorkerId) -> None:
        super().__init__(f"The decode worker {worker_id} was lost while it served this request; send it again.")


Event = worker_pb2.TokenOutput | WorkerLost
Sink = Callable[[Event, float], None]
"""Takes one request's outputs, called on the loop, and when they came on the pool's clock (one reading for all that
came together). The last one has a finish reason or is a WorkerLost."""
OnChange = Callable[[Sequence[WorkerInfo]], None]


class WorkerPool:
    """Follows the membership; what is not a member any more keeps its stream until its last request ends."""

    def __init__(
        self,
        membership: Membership,
        clock: Clock = monotonic,
        reconnect_delays_s: Sequence[float] = RECONNECT_DELAYS_S,
        on_change: OnChange = lambda _: None,
    ) -> None:
        """`on_change` is told who is usable whenever that, or anything in their records, has changed; a worker that
        is lost is known to be before the requests on it are."""
        self._membership, self._clock, self._delays_s, self._on_change = (
            membership,
            clock,
            reconnect_delays_s,
            on_change,
        )
        self.is_stopped = False
        self._links: dict[tuple[WorkerId, str], WorkerLink] = {}
        self._usable: dict[str, tuple[WorkerInfo, ...]] = {}
        self._unusable: dict[str, dict[WorkerId, str]] = {}
        self._news = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._following = asyncio.create_task(self._follow(), name="follow membership")

    async def stop(self) -> None:
        """Idempotent. Nobody is usable any more, and what is still in flight breaks."""
        self.is_stopped = True
        self.refresh()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        links = list(self._links.values())
        for link in links:
            link.close()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)

    @property
    def members(self) -> Sequence[WorkerInfo]:
        """All workers of the cluster, of whatever model and state."""
        return self._membership.workers()

    def is_ready(self, model: str) -> bool:
        """Whether a request to the model could be served now."""
        return any(worker.role == "decode" for worker in self.usable(model))

    def usable(self, model: str) -> Sequence[WorkerInfo]:
        """The model's ready workers; the decode workers among them are connected."""
        return self._usable.get(model, ())

    def unusable(self, model: str) -> Mapping[WorkerId, str]:
        """The model's other members, and why nothing is sent there."""
        return self._unusable.get(model, {})

    async def changed(self) -> None:
        """Returns when a worker was connected or lost, or the membership changed."""
        await self._news.wait()

    def submit(self, worker: WorkerInfo, message: worker_pb2.Submit, sink: Sink) -> None:
        """`worker` is one of `usable`; outputs come to the sink until the last one or `cancel`."""
        self._links[_key(worker)].submit(message, sink)

    def cancel(self, worker: WorkerInfo, request_id: RequestId) -> None:
        """The sink hears no more, and the worker frees the request's blocks. Unknown ids are ignored."""
        if link := self._links.get(_key(worker)):
            link.cancel(request_id)

    async def _follow(self) -> None:
        while True:
            self._reconcile()
            self.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MEMBERSHIP_WAIT_MAX_S):
                    await self._membership.changed()

    def _reconcile(self) -> None:
        members = {_key(worker): worker for worker in self.members if worker.role == "decode"}
        for key, worker in members.items():
            if key not in self._links:
                self._links[key] = WorkerLink(worker, self._clock, self._delays_s, self.refresh, self._forget)
        for key, link in list(self._links.items()):
            link.is_member = key in members
            link.close_if_unused()

    def _forget(self, link: "WorkerLink") -> None:
        if self._links.get(_key(link.worker)) is link:
            del self._links[_key(link.worker)]
            if not self.is_stopped:
                self._reconcile()  # it may have come back while its stream was being closed
            self.refresh()

    def refresh(self) -> None:
        """Looks again who is usable, and tells whoever waits for a change."""
        usable: dict[str, list[WorkerInfo]] = {}
        unusable: dict[str, dict[WorkerId, str]] = {}
        for worker in self.members:
            if (reason := self._why_unusable(worker)) is None:
                usable.setdefault(worker.model, []).append(worker)
            else:
                unusable.setdefault(worker.model, {})[worker.worker_id] = reason
        self._usable = {model: tuple(workers) for model, workers in usable.items()}
        self._unusable = unusable
        self._on_change([worker for workers in usable.values() for worker in workers])
        self._news.set()
        self._news = asyncio.Event()

    def _why_unusable(self, worker: WorkerInfo) -> str | None:
        if self.is_stopped:
            return "this router is shutting down"
        if not worker.is_ready:
            return worker.state
        link = self._links.get(_key(worker))
        return None if worker.role == "prefill" or (link is not None and link.is_connected) else "not connected"


class WorkerLink:
    """One decode worker, from one start of its process to the next."""

    def __init__(
        self,
        worker: WorkerInfo,
        clock: Clock,
        delays_s: Sequence[float],
        on_change: Callable[[], None],
        on_end: Callable[["WorkerLink"], None],
    ) -> None:
        self.worker, self.is_member, self.is_connected = worker, True, False
        self._clock, self._delays_s, self._on_change, self._on_end = clock, delays_s, on_change, on_end
        self._sinks: dict[RequestId, Sink] = {}
        # Bounded by the requests admitted: a submit and a cancel for each. None ends the stream.
        self._outbox: asyncio.Queue[worker_pb2.ServeRequest | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._run(), name=f"stream to {worker.worker_id}")

    def submit(self, message: worker_pb2.Submit, sink: Sink) -> None:
        assert self.is_connected
        self._sinks[RequestId(message.request_id)] = sink
        self._outbox.put_nowait(worker_pb2.ServeRequest(submit=message))

    def cancel(self, request_id: RequestId) -> None:
        if self._sinks.pop(request_id, None):
            self._outbox.put_nowait(worker_pb2.ServeRequest(cancel=worker_pb2.Cancel(request_id=request_id)))
            self.close_if_unused()

    def close_if_unused(self) -> None:
        if not self.is_member and not self._sinks:
            self.close()

    def close(self) -> None:
        self.task.cancel()

    async def _run(self) -> None:
        attempt = 0
        try:
            while self.is_member:
                was_connected = await self._serve_once()
                attempt = 0 if was_connected else attempt
                await asyncio.sleep(self._delays_s[min(attempt, len(self._delays_s) - 1)])
                attempt += 1
        finally:
            self._on_end(self)

    async def _serve_once(self) -> bool:
        """Returns, when the stream has broken, whether it had been open."""
        self._outbox = asyncio.Queue()
        was_connected = False
        try:
            async with grpc.aio.insecure_channel(self.worker.address, options=CHANNEL_OPTIONS) as channel:
                call = worker_pb2_grpc.DecodeWorkerStub(channel).Serve(self._outgoing())
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await call.wait_for_connection()
                was_connected = True
                self._set_connected(True)
                async for response in call:
                    now_s = self._clock()
                    for output in response.outputs:
                        self._deliver(output, now_s)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            reason = error.code().name if isinstance(error, grpc.aio.AioRpcError) else "no answer"
            log.warning("stream to decode worker %s: %s", self.worker.worker_id, reason)
        finally:
            self._outbox.put_nowait(None)  # grpc's own task, which waits for messages, outlives a broken call
            self._set_connected(False)
            self._break_all()
        return was_connected

    async def _outgoing(self) -> AsyncIterator[worker_pb2.ServeRequest]:
        outbox = self._outbox
        while (message := await outbox.get()) is not None:
            yield message

    def _deliver(self, output: worker_pb2.TokenOutput, now_s: float) -> None:
        request_id = RequestId(output.request_id)
        if (sink := self._sinks.get(request_id)) is None:
            return  # cancelled; this was under way
        if output.finish_reason:
            del self._sinks[request_id]
            self.close_if_unused()
        sink(output, now_s)

    def _break_all(self) -> None:
        sinks, self._sinks = self._sinks, {}
        now_s = self._clock()
        for sink in sinks.values():
            sink(WorkerLost(self.worker.worker_id), now_s)

    def _set_connected(self, is_connected: bool) -> None:
        if self.is_connected != is_connected:
            self.is_connected = is_connected
            self._on_change()


def _key(worker: WorkerInfo) -> tuple[WorkerId, str]:
    return worker.worker_id, worker.epoch
