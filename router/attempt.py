"""One sequence on one pair of workers: measured from its placement to its end."""

from collections.abc import Callable
from dataclasses import dataclass

from baton.ids import RequestId, WorkerId
from baton.rpc import common_pb2, worker_pb2
from router.cooldown import Cooldowns
from router.metrics import ModelMetrics
from router.placement.decision import Decision
from router.placement.decision_log import Outcome, PlacementRecord
from router.placement.placer import Placer
from router.worker_pool import Event, WorkerLost

PROGRESS_TOKENS = 16
"""The placer is told of so many tokens at a time: it prices by hundreds, and is not to be called for each."""
_OUTCOMES: dict[int, Outcome] = {
    common_pb2.FINISH_REASON_STOP: "finished",
    common_pb2.FINISH_REASON_LENGTH: "finished",
}


class Pace:
    """When one sequence's tokens came, on whichever workers: what its client sees."""

    __slots__ = ("_arrived_s", "_is_closed", "_last_token_s", "_metrics")

    def __init__(self, metrics: ModelMetrics, arrived_s: float) -> None:
        self._metrics, self._arrived_s = metrics, arrived_s
        self._last_token_s: float | None = None
        self._is_closed = False
        metrics.waiting.inc()

    def tokens_came(self, now_s: float) -> None:
        if self._last_token_s is None:
            self._metrics.time_to_first_token_s.observe(now_s - self._arrived_s)
            self._metrics.waiting.dec()
            self._metrics.running.inc()
        else:
            self._metrics.inter_token_latency_s.observe(now_s - self._last_token_s)
        self._last_token_s = now_s

    def close(self) -> None:
        """Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            (self._metrics.waiting if self._last_token_s is None else self._metrics.running).dec()


@dataclass(frozen=True, slots=True)
class Books:
    """Where it is written down what becomes of the sequences of one model."""

    placer: Placer
    cooldowns: Cooldowns
    metrics: ModelMetrics
    has_room: Callable[[], None]
    """Told whenever a worker may have room again."""


@dataclass(slots=True, eq=False)
class Attempt:
    """Takes the worker's outputs as they come and hands them on, whether or not anybody reads them yet: so what it
    measures and tells the placer does not wait for a slow client."""

    wire_id: RequestId
    decision: Decision
    record: PlacementRecord
    placed_s: float
    pace: Pace
    books: Books
    hand_on: Callable[[Event], None]
    tokens: int = 0
    told_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    is_over: bool = False

    def take(self, event: Event, now_s: float) -> None:
        """A pool's Sink."""
        if isinstance(event, WorkerLost):
            self.end("failed")
        else:
            if event.token_ids:
                self._count(event, now_s)
            if event.finish_reason:
                self._finish(event)
        self.hand_on(event)

    def end(self, outcome: Outcome, timeline: common_pb2.Timeline | None = None) -> None:
        """Idempotent. The workers' load is no longer its own."""
        if self.is_over:
            return
        self.is_over = True
        if itl_s := self.itl_s:
            self._compare_itl(itl_s)
        self.books.placer.finished(self.wire_id)
        self.books.has_room()
        self.record.ended(outcome, self.tokens, itl_s, timeline)

    @property
    def itl_s(self) -> float:
        """Mean; 0 before the second token."""
        return (self.last_token_s - self.first_token_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def _count(self, output: worker_pb2.TokenOutput, now_s: float) -> None:
        self.pace.tokens_came(now_s)
        if not self.tokens:
            self._started(output, now_s)
        self.tokens += len(output.token_ids)
        self.last_token_s = now_s
        if self.tokens - self.told_tokens >= PROGRESS_TOKENS:
            self.books.placer.progress(self.wire_id, self.tokens - self.told_tokens)
            self.told_tokens = self.tokens

    def _started(self, output: worker_pb2.TokenOutput, now_s: float) -> None:
        timeline = output.timeline if output.HasField("timeline") else None
        self.first_token_s = now_s
        self.books.placer.first_token(self.wire_id)
        self.books.has_room()
        self._compare_ttft(now_s - self.placed_s)
        self.record.first_token(now_s - self.placed_s, output.cached_tokens, timeline)
        for worker_id in output.failed_prefill_workers:
            self.books.cooldowns.failed(WorkerId(worker_id), self.placed_s)

    def _compare_ttft(self, ttft_s: float) -> None:
        if (predicted_s := self.decision.chosen.terms.ttft_s) > 0:
            self.books.metrics.ttft_error_ratio.observe(ttft_s / predicted_s)

    def _compare_itl(self, itl_s: float) -> None:
        if (predicted_s := self.decision.chosen.itl_s) > 0:
            self.books.metrics.itl_error_ratio.observe(itl_s / predicted_s)

    def _finish(self, output: worker_pb2.TokenOutput) -> None:
        outcome = _OUTCOMES.get(output.finish_reason, "failed")
        if outcome == "finished":
            for worker_id in (self.decision.chosen.decode.worker_id, output.timeline.prefill_worker):
                self.books.cooldowns.succeeded(WorkerId(worker_id), self.placed_s)
        self.end(outcome, output.timeline if output.HasField("timeline") else None)
