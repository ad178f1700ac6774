"""A request's life: placed, submitted, its tokens turned into text, and over; placed anew if a worker fails it."""

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from baton.clock import Clock
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from baton.ids import RequestId, WorkerId
from baton.rpc import common_pb2, worker_pb2
from baton.rpc.convert import sampling_to_proto
from router.admission.expected_tokens import ExpectedTokens
from router.attempt import Attempt, Books, Pace
from router.cooldown import Cooldowns
from router.metrics import ModelMetrics
from router.model_facts import ModelFacts
from router.placement.block_names import BlockNames
from router.placement.decision import Decision, Fallback, Fetch
from router.placement.decision_log import DecisionLog, RequestRecord
from router.placement.placer import Placer
from router.placement.price import PlacementRequest
from router.retention import Retention
from router.sequence import Delta, SequenceProgress, SequenceRequest
from router.text.tokenizer import Tokenizer
from router.worker_pool import Event, WorkerLost, WorkerPool

log = logging.getLogger(__name__)


class WorkerFault(BatonError):
    """The decode worker failed this request for a reason of its own."""


_ERRORS: dict[int, Callable[[str], BatonError]] = {
    worker_pb2.ERROR_KIND_INVALID_REQUEST: InvalidRequest,
    worker_pb2.ERROR_KIND_OVERLOADED: Overloaded,
    worker_pb2.ERROR_KIND_UNAVAILABLE: Unavailable,
    worker_pb2.ERROR_KIND_DEADLINE_EXCEEDED: DeadlineExceeded,
}


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Generator:
    """Starts generations of one model on the pool's workers."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        pool: WorkerPool,
        placer: Placer,
        decisions: DecisionLog,
        cooldowns: Cooldowns,
        metrics: ModelMetrics,
        clock: Clock,
        request_timeout_s: float,
        failover_max: int,
        failover_wait_s: float,
        has_room: Callable[[], None] = lambda: None,
    ) -> None:
        """A sequence is placed anew `failover_max` times at most, and each time waits `failover_wait_s` at most for
        a worker that can take it. `has_room` is called whenever workers may have room for more."""
        self.model, self.tokenizer, self.pool, self.placer = model, tokenizer, pool, placer
        self.decisions, self.cooldowns, self.metrics = decisions, cooldowns, metrics
        self.clock, self.request_timeout_s = clock, request_timeout_s
        self.failover_max, self.failover_wait_s = failover_max, failover_wait_s
        self.books = Books(placer, cooldowns, metrics, has_room)
        self.expected_tokens = ExpectedTokens()

    def facts(self) -> ModelFacts:
        """Raises Unavailable while no decode worker is ready: only they know."""
        workers = [worker for worker in self.pool.usable(self.model) if worker.role == "decode"]
        if not workers:
            raise Unavailable("No decode worker is ready to serve this model now; try again in a while.")
        return ModelFacts(
            min(worker.context_length for worker in workers), min(worker.vocabulary_size for worker in workers)
        )

    def start(
        self,
        request_id: RequestId,
        requests: Sequence[SequenceRequest],
        arrived_s: float,
        deadline_s: float | None = None,
        tenant: str = "",
    ) -> "Generation":
        """`arrived_s` and the client's deadline are on the generator's clock. The caller closes it, whatever happens.

        Raises Unavailable if nobody can serve it, DeadlineExceeded if it is late already.
        """
        record = RequestRecord(request_id, tenant)
        generation = Generation(self, record, [self._progress(request) for request in requests], arrived_s)
        try:
            generation.begin(deadline_s)
        except BatonError:
            generation.close()
            raise
        return generation

    def excluded(self) -> dict[WorkerId, str]:
        """Who is to get nothing now, and why."""
        usable = self.pool.usable(self.model)
        cooling = self.cooldowns.excluded(
            (worker.worker_id for worker in usable if worker.role == "decode"),
            (worker.worker_id for worker in usable if worker.role == "prefill"),
        )
        return {**self.pool.unusable(self.model), **cooling}

    def _progress(self, request: SequenceRequest) -> SequenceProgress:
        preceding = request.prompt if request.continues_prompt else ()
        skip = request.skip_special_tokens
        detokenizer = self.tokenizer.detokenizer(skip_special_tokens=skip, preceding=preceding)
        return SequenceProgress(request, detokenizer)


@dataclass(frozen=True, slots=True)
class _Ending:
    """What ends the whole request."""

    error: BatonError


class Generation:
    """All sequences of one client request."""

    def __init__(
        self, generator: Generator, record: RequestRecord, sequences: list[SequenceProgress], arrived_s: float
    ) -> None:
        self.request_id, self.sequences = record.request_id, sequences
        self._generator, self._arrived_s, self._record = generator, arrived_s, record
        self._paces = [Pace(generator.metrics, arrived_s) for _ in sequences]
        self._unfinished = set(range(len(sequences)))
        self._attempts: dict[int, Attempt] = {}
        self._attempts_made = [0] * len(sequences)
        self._failed: dict[int, set[WorkerId]] = {}
        """Decode workers, by the sequence that they failed."""
        self._searches: dict[int, asyncio.Task[None]] = {}
        # Bounded by the tokens asked for: one event a sequence and engine step.
        self._events: deque[tuple[int, Event | _Ending]] = deque()
        self._waiting: asyncio.Future[None] | None = None
        """Of `next`, for an event."""
        self._ends_at_s = 0.0
        self._expired = DeadlineExceeded()
        self._timer: asyncio.TimerHandle | None = None
        self._names: dict[int, BlockNames] = {}
        """By the prompt's identity: its continuations share what was hashed."""

    @property
    def is_finished(self) -> bool:
        return not self._unfinished

    @property
    def usage(self) -> Usage:
        """So far. A prompt counts once, however many continuations it has."""
        first = [sequence for sequence in self.sequences if sequence.request.choice == 0]
        return Usage(
            sum(len(sequence.request.prompt) for sequence in first),
            sum(sequence.completion_tokens for sequence in self.sequences),
            sum(sequence.cached_tokens for sequence in first),
        )

    def begin(self, deadline_s: float | None) -> None:
        """Submits every sequence. Raises as Generator.start does."""
        timeout_s = self._generator.request_timeout_s
        self._ends_at_s = self._arrived_s + timeout_s
        why = f"The request was not finished within {timeout_s:g} s, the most this server gives."
        if deadline_s is not None and deadline_s < self._ends_at_s:
            self._ends_at_s, why = deadline_s, "The request was not finished by its deadline."
        self._expired = DeadlineExceeded(why)
        if self._left_s <= 0:
            raise self._expired
        self._timer = asyncio.get_running_loop().call_later(self._left_s, self._expire)
        for index in self._unfinished:
            self._place(index, self._generator.excluded())
        self._generator.metrics.prompt_tokens.inc(self.usage.prompt_tokens)

    async def next(self) -> tuple[int, Delta] | None:
        """A sequence's index and what is new in it; None when all are finished.

        Raises the BatonError that ended the request."""
        while self._unfinished:
            if not self._events:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
            index, event = self._events.popleft()
            if isinstance(event, _Ending):
                raise event.error
            if index not in self._unfinished:
                continue  # a stop string ended it while more was under way
            if (error := _error(event)) is not None:
                self._fail_over(index, error)
            else:
                assert isinstance(event, worker_pb2.TokenOutput)
                return index, self._take(index, event)
        return None

    def close(self) -> None:
        """Idempotent. What is unfinished is cancelled on its worker at once."""
        if self._timer is not None:
            self._timer.cancel()
        for search in self._searches.values():
            search.cancel()
        for index in list(self._attempts):
            self._leave_worker(index)
        for pace in self._paces:
            pace.close()

    # ---- tokens

    def _take(self, index: int, output: worker_pb2.TokenOutput) -> Delta:
        generator, sequence = self._generator, self.sequences[index]
        delta = sequence.take(output)
        generator.metrics.generation_tokens.inc(len(delta.token_ids))
        if sequence.is_finished:
            self._finish(index)
        return delta

    def _finish(self, index: int) -> None:
        generator, sequence = self._generator, self.sequences[index]
        self._unfinished.remove(index)
        self._attempts[index].end("finished")
        self._leave_worker(index)
        self._paces[index].close()
        generator.expected_tokens.observe(generator.model, len(sequence.generated))
        generator.metrics.cached_tokens.inc(sequence.cached_tokens if sequence.request.choice == 0 else 0)
        if not self._unfinished:
            generator.metrics.e2e_latency_s.observe(generator.clock() - self._arrived_s)

    # ---- placement

    def _place(self, index: int, excluded: dict[WorkerId, str]) -> None:
        """Raises Unavailable if nobody else can take the sequence now."""
        generator, sequence = self._generator, self.sequences[index]
        placed_s = generator.clock()
        request = self._placement_request(index)
        decision = generator.placer.place(request, excluded)
        decided_in_s = generator.clock() - placed_s
        # A client may use an id twice, and a worker may still be clearing up the last attempt.
        wire_id = RequestId(f"{self.request_id}-{index}-{secrets.token_hex(4)}")
        generator.placer.reserve(wire_id, decision, request)
        self._attempts_made[index] += 1
        record = generator.decisions.record(
            self._record, decision, decided_in_s, choice=index, attempt=self._attempts_made[index]
        )
        self._attempts[index] = attempt = Attempt(
            wire_id,
            decision,
            record,
            placed_s,
            self._paces[index],
            generator.books,
            partial(self._put, index),
        )
        _count_placement(generator.metrics, decision, decided_in_s)
        message = _submit(wire_id, sequence, decision, self._left_s)
        generator.pool.submit(decision.chosen.decode, message, attempt.take)

    def _placement_request(self, index: int) -> PlacementRequest:
        sequence = self.sequences[index]
        request = sequence.request
        if sequence.has_started:
            tokens: Sequence[int] = [*request.prompt, *sequence.generated]
            names = BlockNames(tokens, request.cache_salt)
        else:
            tokens = request.prompt
            names = self._names.setdefault(id(tokens), BlockNames(tokens, request.cache_salt))
        model = self._generator.model
        expected_tokens = self._generator.expected_tokens.of(model, sequence.tokens_max)
        failed = frozenset(self._failed.get(index, ()))
        return PlacementRequest(model, len(tokens), expected_tokens, names, failed)

    def _leave_worker(self, index: int) -> None:
        if (attempt := self._attempts.pop(index, None)) is not None:
            attempt.end("cancelled")
            self._generator.pool.cancel(attempt.decision.chosen.decode, attempt.wire_id)

    # ---- failover

    def _fail_over(self, index: int, error: BatonError) -> None:
        """Another worker goes on with the sequence, now or when there is one. Raises the error if that may not be."""
        attempt = self._attempts[index]
        self._leave_worker(index)
        if isinstance(error, DeadlineExceeded):
            raise self._expired  # the worker's clock was the faster one
        if not isinstance(error, (Unavailable, Overloaded, WorkerFault)):
            raise error
        failed = attempt.decision.chosen.decode.worker_id
        self._failed.setdefault(index, set()).add(failed)
        is_overloaded = isinstance(error, Overloaded)
        self._generator.cooldowns.failed(failed, attempt.placed_s, is_overloaded=is_overloaded)
        if self._attempts_made[index] > self._failovers_max(error):
            raise error
        log.info("request %s is placed anew: %s failed it", self.request_id, failed)
        if self._place_anew(index, failed, error):
            return
        if not self._may_wait(index, error):
            raise error
        self._searches[index] = asyncio.create_task(self._search(index, failed, error), name="search for a worker")

    def _failovers_max(self, error: BatonError) -> int:
        """What fails inside a worker may be the request's own doing, and is not carried from one to the next."""
        bound = self._generator.failover_max
        return min(bound, 1) if isinstance(error, WorkerFault) else bound

    def _may_wait(self, index: int, error: BatonError) -> bool:
        """An overloaded worker's refusal goes to the client, unless there is something to lose."""
        has_started = self.sequences[index].has_started
        return isinstance(error, Unavailable) or (has_started and isinstance(error, Overloaded))

    def _place_anew(self, index: int, failed: WorkerId, error: BatonError) -> bool:
        """Whether somebody could take it now. One that failed it with an answer, rather than by being lost and
        found again, is not asked before its cool-down is over."""
        generator = self._generator
        excluded = generator.excluded()
        if not isinstance(error, WorkerLost) and generator.cooldowns.remaining_s(failed):
            excluded[failed] = "it has just failed this request"
        try:
            self._place(index, excluded)
        except Unavailable:
            return False
        generator.metrics.retries.inc()
        return True

    async def _search(self, index: int, failed: WorkerId, error: BatonError) -> None:
        """Until somebody could take the sequence, or has not for too long."""
        generator = self._generator
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(generator.failover_wait_s):
                while not generator.pool.is_stopped:
                    if self._place_anew(index, failed, error):
                        return
                    await self._something_changes(failed)
        self._put(index, _Ending(error))

    async def _something_changes(self, failed: WorkerId) -> None:
        """Returns when a worker came or went, or the cool-down of the one that failed is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._generator.cooldowns.remaining_s(failed) or None):
                await self._generator.pool.changed()

    # ---- events

    @property
    def _left_s(self) -> float:
        return self._ends_at_s - self._generator.clock()

    def _put(self, index: int, event: Event | _Ending) -> None:
        self._events.append((index, event))
        self._wake()

    def _expire(self) -> None:
        self._events.appendleft((0, _Ending(self._expired)))
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _submit(wire_id: RequestId, sequence: SequenceProgress, decision: Decision, deadline_s: float) -> worker_pb2.Submit:
    chosen, request = decision.chosen, sequence.request
    plans = [] if chosen.prefill is None else [Fallback(chosen.prefill, chosen.fetch), *decision.prefill_fallbacks]
    return worker_pb2.Submit(
        request_id=wire_id,
        prompt=request.prompt,
        generated=sequence.generated,
        sampling=sampling_to_proto(sequence.resume()),
        cache_salt=request.cache_salt,
        prefill_candidates=map(_prefill_candidate, plans),
        deadline_s=max(deadline_s, 0.001),  # 0 would mean none
        retention=_retention(request.retention),
        fetch=_fetch_plan(chosen.fetch) if chosen.prefill is None else None,
    )


def _retention(retention: Retention) -> common_pb2.CacheRetention:
    return common_pb2.CacheRetention(
        ttl_s=retention.ttl_s, pin=retention.pin, tenant=retention.tenant, quota_bytes=retention.quota_bytes
    )


def _prefill_candidate(plan: Fallback) -> worker_pb2.PrefillCandidate:
    worker = plan.worker
    return worker_pb2.PrefillCandidate(
        worker_id=worker.worker_id, address=worker.address, fetch=_fetch_plan(plan.fetch)
    )


def _fetch_plan(fetch: Fetch | None) -> common_pb2.FetchPlan | None:
    if fetch is None:
        return None
    peer = fetch.worker
    return common_pb2.FetchPlan(
        worker_id=peer.worker_id,
        address=peer.address,
        blocks=fetch.tokens // peer.block_tokens,
        block_tokens=peer.block_tokens,
        fetch_s=fetch.fetch_s,
        compute_s=fetch.compute_s,
    )


def _count_placement(metrics: ModelMetrics, decision: Decision, decided_in_s: float) -> None:
    (metrics.placements_local if decision.chosen.prefill is None else metrics.placements_pair).inc()
    if decision.chosen.fetch is not None:
        metrics.placements_fetching.inc()
    metrics.decision_s.observe(decided_in_s)


def _error(event: Event) -> BatonError | None:
    if isinstance(event, WorkerLost):
        return event
    if event.finish_reason == common_pb2.FINISH_REASON_ERROR:
        kind = _ERRORS.get(event.error_kind, WorkerFault)
        return kind(event.error or "The decode worker failed this request.")
    if event.finish_reason == common_pb2.FINISH_REASON_CANCELLED:
        return Unavailable("The decode worker gave this request up; send it again.")
    return None
