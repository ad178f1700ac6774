"""A request's life: placed, submitted, its tokens turned into text, and over; placed again if need be."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.clock import Clock
from baton.cluster.worker_info import WorkerInfo
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from baton.ids import RequestId
from baton.rpc import common_pb2, worker_pb2
from baton.rpc.convert import sampling_to_proto
from baton.sampling import SamplingParams
from router.metrics import RouterMetrics
from router.placement import Placement, Placer
from router.sequence import Delta, SequenceProgress, SequenceRequest
from router.tokenizer import Tokenizer
from router.worker_pool import WorkerLost, WorkerPool

log = logging.getLogger(__name__)

TRIES_MAX = 3
"""How often a sequence without a token yet is placed; one with tokens never is placed again."""
_RETRIABLE = (worker_pb2.ERROR_KIND_UNAVAILABLE, worker_pb2.ERROR_KIND_OVERLOADED)
_ERRORS: dict[int, Callable[[str], BatonError]] = {
    worker_pb2.ERROR_KIND_INVALID_REQUEST: InvalidRequest,
    worker_pb2.ERROR_KIND_OVERLOADED: Overloaded,
    worker_pb2.ERROR_KIND_UNAVAILABLE: Unavailable,
}
Event = worker_pb2.TokenOutput | WorkerLost | DeadlineExceeded


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What every worker of the model can do."""

    context_length: int
    vocabulary_size: int

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises InvalidRequest if the prompt is empty, does not fit, or holds ids that do not exist."""
        if not prompt:
            raise InvalidRequest("The prompt is empty; it must have at least one token.", "prompt")
        if len(prompt) >= self.context_length:
            raise InvalidRequest(
                f"The prompt has {len(prompt)} tokens, but the model's context is {self.context_length} tokens, "
                "prompt and completion together.",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= self.vocabulary_size:
            raise InvalidRequest(
                f"The prompt holds a token id outside the model's, which run from 0 to {self.vocabulary_size - 1}.",
                "prompt",
            )

    def complete(
        self, sampling: SamplingParams, prompt_tokens: int, seed: int, max_tokens_default: int | None = None
    ) -> SamplingParams:
        """With `max_tokens` and `seed` set; unasked, as many tokens as there is room for, or the default if less.

        Raises InvalidRequest if the prompt leaves less room than was asked for.
        """
        room = self.context_length - prompt_tokens
        default = room if max_tokens_default is None else min(room, max_tokens_default)
        max_tokens = default if sampling.max_tokens is None else sampling.max_tokens
        if max_tokens > room:
            raise InvalidRequest(
                f"The model's context is {self.context_length} tokens, but {prompt_tokens + max_tokens} were asked "
                f"for: {prompt_tokens} in the prompt and {max_tokens} to generate.",
                "max_tokens",
            )
        sampling.check_vocabulary(self.vocabulary_size)
        return sampling.with_changes(max_tokens=max_tokens, seed=seed if sampling.seed is None else sampling.seed)


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generator:
    """Starts generations on the pool's workers, for the one model of this router."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        pool: WorkerPool,
        metrics: RouterMetrics,
        clock: Clock,
        request_timeout_s: float,
    ) -> None:
        self.model, self.tokenizer, self.pool, self.metrics = model, tokenizer, pool, metrics
        self.clock, self.request_timeout_s = clock, request_timeout_s
        self.placer = Placer()

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound."""
        if name != self.model:
            raise ModelNotFound(f"The model {name[:200]!r} is not served here; {self.model!r} is.", "model")

    def facts(self) -> ModelFacts:
        """Raises Unavailable while no decode worker is ready: only they know."""
        workers = [worker for worker in self.pool.usable() if worker.role == "decode"]
        if not workers:
            raise Unavailable("No decode worker is ready to serve this model now; try again in a while.")
        return ModelFacts(
            min(worker.context_length for worker in workers), min(worker.vocabulary_size for worker in workers)
        )

    def start(self, request_id: RequestId, requests: Sequence[SequenceRequest], arrived_s: float) -> "Generation":
        """The caller closes it, whatever happens. Raises Unavailable if nobody can serve it."""
        generation = Generation(self, request_id, [self._progress(request) for request in requests], arrived_s)
        try:
            generation.submit_all()
        except BatonError:
            generation.close()
            raise
        return generation

    def _progress(self, request: SequenceRequest) -> SequenceProgress:
        preceding = request.prompt if request.continues_prompt else ()
        skip = request.skip_special_tokens
        detokenizer = self.tokenizer.detokenizer(skip_special_tokens=skip, preceding=preceding)
        return SequenceProgress(request, detokenizer)


@dataclass(slots=True)
class _Attempt:
    """One sequence on one decode worker."""

    wire_id: RequestId
    placement: Placement
    last_token_s: float | None = None

    @property
    def worker(self) -> WorkerInfo:
        return self.placement.decode.worker


class Generation:
    """All sequences of one client request."""

    def __init__(
        self, generator: Generator, request_id: RequestId, sequences: list[SequenceProgress], arrived_s: float
    ) -> None:
        self.request_id, self.sequences = request_id, sequences
        self._generator, self._arrived_s = generator, arrived_s
        self._attempts: dict[int, _Attempt] = {}
        self._tries = [0] * len(sequences)
        # Bounded by the tokens asked for: one event a sequence and engine step.
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        timeout_s = generator.request_timeout_s
        expired = DeadlineExceeded(f"The request was not finished within {timeout_s:g} s, the most this server gives.")
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._events.put_nowait, (0, expired))

    @property
    def is_finished(self) -> bool:
        return not self._attempts

    @property
    def usage(self) -> Usage:
        """So far. A prompt counts once, however many continuations it has."""
        first = [sequence for sequence in self.sequences if sequence.request.choice == 0]
        return Usage(
            sum(len(sequence.request.prompt) for sequence in first),
            sum(sequence.completion_tokens for sequence in self.sequences),
            sum(sequence.cached_tokens for sequence in first),
        )

    def submit_all(self) -> None:
        for index in range(len(self.sequences)):
            self._submit(index, self._generator.pool.usable())
        self._generator.metrics.prompt_tokens.inc(self.usage.prompt_tokens)

    async def next(self) -> tuple[int, Delta] | None:
        """A sequence's index and what is new in it; None when all are finished.

        Raises the BatonError that ended the request."""
        while self._attempts:
            index, event = await self._events.get()
            if isinstance(event, DeadlineExceeded):
                raise event
            if index not in self._attempts:
                continue  # a stop string ended it while more was under way
            error = event if isinstance(event, WorkerLost) else _error(event)
            if error is None:
                assert isinstance(event, worker_pb2.TokenOutput)
                return index, self._take(index, event)
            self._retry(index, error)
        return None

    def close(self) -> None:
        """Idempotent. What is unfinished is cancelled on its worker at once."""
        self._timer.cancel()
        for index in list(self._attempts):
            self._end(index)

    def _submit(self, index: int, workers: Sequence[WorkerInfo]) -> None:
        request = self.sequences[index].request
        placement = self._generator.placer.place(request.prompt, request.cache_salt, workers)
        # A client may use an id twice, and a worker may still be clearing up the last try.
        wire_id = RequestId(f"{self.request_id}-{index}-{secrets.token_hex(4)}")
        message = worker_pb2.Submit(
            request_id=wire_id,
            prompt=request.prompt,
            sampling=sampling_to_proto(request.sampling),
            cache_salt=request.cache_salt,
            prefill_candidates=[
                worker_pb2.PrefillCandidate(worker_id=c.worker.worker_id, address=c.worker.address)
                for c in placement.prefill
            ],
        )
        self._tries[index] += 1
        self._attempts[index] = attempt = _Attempt(wire_id, placement)
        self._generator.placer.started(wire_id, placement)
        self._generator.metrics.waiting.inc()
        self._generator.pool.submit(attempt.worker, message, lambda event: self._events.put_nowait((index, event)))

    def _take(self, index: int, output: worker_pb2.TokenOutput) -> Delta:
        attempt, sequence = self._attempts[index], self.sequences[index]
        self._measure(attempt)
        delta = sequence.take(output)
        metrics = self._generator.metrics
        metrics.generation_tokens.inc(len(delta.token_ids))
        if sequence.is_finished:
            self._end(index)
            metrics.cached_tokens.inc(sequence.cached_tokens if sequence.request.choice == 0 else 0)
            if not self._attempts:
                metrics.e2e_latency_s.observe(self._generator.clock() - self._arrived_s)
        return delta

    def _measure(self, attempt: _Attempt) -> None:
        now_s = self._generator.clock()
        metrics = self._generator.metrics
        if attempt.last_token_s is not None:
            metrics.inter_token_latency_s.observe(now_s - attempt.last_token_s)
        else:
            metrics.time_to_first_token_s.observe(now_s - self._arrived_s)
            metrics.waiting.dec()
            metrics.running.inc()
            self._generator.placer.in_flight.prefilled(attempt.wire_id)
        attempt.last_token_s = now_s

    def _retry(self, index: int, error: BatonError) -> None:
        """Places the sequence on another worker if it has no token yet; else raises the error."""
        failed = self._attempts[index].worker
        has_started = self.sequences[index].has_started
        self._end(index)
        if has_started or self._tries[index] >= TRIES_MAX or not isinstance(error, (Unavailable, Overloaded)):
            raise error
        others = [worker for worker in self._generator.pool.usable() if worker.worker_id != failed.worker_id]
        log.info("request %s is placed again: %s failed it", self.request_id, failed.worker_id)
        try:
            self._submit(index, others)
        except Unavailable:  # there is nobody else; what went wrong first says more
            raise error from None
        self._generator.metrics.retries.inc()

    def _end(self, index: int) -> None:
        attempt = self._attempts.pop(index)
        metrics = self._generator.metrics
        (metrics.waiting if attempt.last_token_s is None else metrics.running).dec()
        self._generator.placer.in_flight.finished(attempt.wire_id)
        self._generator.pool.cancel(attempt.worker, attempt.wire_id)


def _error(output: worker_pb2.TokenOutput) -> BatonError | None:
    if output.finish_reason == common_pb2.FINISH_REASON_ERROR:
        return _ERRORS.get(output.error_kind, BatonError)(output.error or "The decode worker failed this request.")
    if output.finish_reason == common_pb2.FINISH_REASON_CANCELLED:
        return Unavailable("The decode worker gave this request up; send it again.")
    return None
