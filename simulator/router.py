"""The router in virtual time: the real prefix index and the real placer, told of the workers as late as in life."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

from baton.cluster.cache_events import CacheChanges, CacheEvents
from baton.cluster.lease import Lease
from baton.cluster.router_info import PlacedLoad
from baton.cluster.worker_info import WorkerInfo
from baton.errors import Unavailable
from baton.ids import BlockHash, WorkerId
from router.admission.expected_tokens import ExpectedTokens
from router.attempt import PROGRESS_TOKENS
from router.index.prefix_index import Applied, PrefixIndex
from router.placement.block_names import BlockKind
from router.placement.placer import Placer
from router.placement.price import PlacementRequest
from simulator.decode import SimulatedDecodeWorker
from simulator.job import Job
from simulator.line import Admission, SimulatedLine
from simulator.prefill import SimulatedPrefillWorker
from simulator.profile import Profile
from simulator.virtual_time import VirtualTime
from simulator.worker import EPOCH, SimulatedWorker

LEASE = Lease()
"""How often workers tell of themselves, and how often routers look."""


class SimulatedRouter:
    """Implements simulator.decode.Router. Ends, with the heartbeats, once all requests have left."""

    def __init__(
        self,
        time: VirtualTime,
        profile: Profile,
        index: PrefixIndex,
        placer: Placer,
        admission: Admission | None,
        requests: int,
        progress: Callable[[int], object],
    ) -> None:
        """Without `admission` every request is placed on arrival."""
        self._time, self._profile, self._index, self._placer = time, profile, index, placer
        self._requests, self._left, self._progress = requests, 0, progress
        self._expected = ExpectedTokens()
        self._line: SimulatedLine | None = None
        if admission is not None:
            self._line = SimulatedLine(time, admission, self._queue_s, self._place, self._refuse)
        self._prefill: dict[WorkerId, SimulatedPrefillWorker] = {}
        self._decode: dict[WorkerId, SimulatedDecodeWorker] = {}
        self._records: dict[WorkerId, WorkerInfo] = {}
        self._batches: dict[WorkerId, count[int]] = {}

    def join(self, prefill: Sequence[SimulatedPrefillWorker], decode: Sequence[SimulatedDecodeWorker]) -> None:
        """The workers of the cluster; they stay."""
        self._prefill = {one.worker.worker_id: one for one in prefill}
        self._decode = {one.worker.worker_id: one for one in decode}
        workers = [*(one.worker for one in prefill), *(one.worker for one in decode)]
        for number, worker in enumerate(workers):
            self._records[worker.worker_id] = worker.info
            self._batches[worker.worker_id] = count(1)
            self._index.join(worker.worker_id, EPOCH)
            self._index.restore(worker.worker_id, EPOCH, 0, {})
            self._beat_later(worker, LEASE.heartbeat_s * (number + 1) / len(workers))
        self._look()

    @property
    def placed(self) -> Mapping[WorkerId, PlacedLoad]:
        """What is under way, by worker."""
        return self._placer.placed()

    # ---- from the workers

    def _beat_later(self, worker: SimulatedWorker, delay_s: float) -> None:
        self._time.after(delay_s, lambda: self._beat(worker))

    def _beat(self, worker: SimulatedWorker) -> None:
        self._records[worker.worker_id] = worker.info
        if self._left < self._requests:
            self._beat_later(worker, LEASE.heartbeat_s)

    def _look(self) -> None:
        """At all records, as a router does at those in Redis."""
        self._placer.set_workers(list(self._records.values()))
        self._index.tidy()
        if self._left < self._requests:
            self._time.after(LEASE.poll_s, self._look)

    def cache_changed(self, worker_id: WorkerId, changes: CacheChanges) -> None:
        """The index hears of it a while later, batch after batch."""
        events = CacheEvents.of(EPOCH, next(self._batches[worker_id]), changes)
        self._time.after(self._profile.event_s, lambda: self._apply(worker_id, events))

    def _apply(self, worker_id: WorkerId, events: CacheEvents) -> None:
        applied = self._index.apply(worker_id, events)
        assert applied is Applied.APPLIED

    # ---- requests

    def arrive(self, job: Job) -> None:
        if self._line is None:
            self._place(job)
        else:
            self._line.arrive(job, self._expected_tokens)

    def _queue_s(self) -> float:
        return self._placer.queue_s(self._profile.model)

    @property
    def _expected_tokens(self) -> int:
        return self._expected.of(None, self._profile.context_length)

    def _place(self, job: Job) -> None:
        request = self._request(job)
        try:
            decision = self._placer.place(request, {})
        except Unavailable as error:
            self._refuse(job, str(error))
            return
        self._placer.reserve(job.number, decision, request)
        chosen = decision.chosen
        job.predicted_ttft_s = chosen.terms.ttft_s
        prefill = self._prefill[chosen.prefill.worker_id] if chosen.prefill else None
        decode = self._decode[chosen.decode.worker_id]
        self._time.after(self._profile.message_s, lambda: decode.submit(job, prefill))

    def _request(self, job: Job) -> PlacementRequest:
        def names(kind: BlockKind) -> Sequence[BlockHash]:
            del kind  # all workers are of one
            return job.names

        return PlacementRequest(self._profile.model, job.request.prompt_tokens, self._expected_tokens, names)

    def first_token(self, job: Job) -> None:
        self._time.after(self._profile.message_s, lambda: self._placer.first_token(job.number))

    def progress(self, job: Job, tokens: int) -> None:
        job.untold_tokens += tokens
        if job.untold_tokens >= PROGRESS_TOKENS:
            self._placer.progress(job.number, job.untold_tokens)
            job.untold_tokens = 0

    def finished(self, job: Job) -> None:
        self._expected.observe(None, job.request.output_tokens)
        self._time.after(self._profile.message_s, lambda: self._forget(job))
        self._leave()

    def _forget(self, job: Job) -> None:
        self._placer.finished(job.number)
        if self._line is not None:
            self._line.finished(job)

    def refused(self, job: Job, reason: str) -> None:
        self._forget(job)
        self._refuse(job, reason)

    def _refuse(self, job: Job, reason: str) -> None:
        job.refused = reason
        self._leave()

    def _leave(self) -> None:
        self._left += 1
        self._progress(self._left)
