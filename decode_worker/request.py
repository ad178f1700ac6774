"""One request on the decode worker: what was asked, how far it is, and where its time went."""

import asyncio
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from baton.clock import Clock
from baton.ids import RequestId
from baton.rpc import common_pb2, worker_pb2
from baton.sampling import SamplingParams
from engine.interface import Admitted, Generated, Prefill, Retention
from engine.worker.prefetch import NOTHING, Prefetched


class Outbox(Protocol):
    """Where a request's outputs go: the stream of the router that sent it."""

    def put(self, output: worker_pb2.TokenOutput) -> None: ...


@dataclass(slots=True)
class ActiveRequest:
    request_id: RequestId
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    """After the prompt, by a decode worker that was lost."""
    sampling: SamplingParams
    cache_salt: str
    candidates: tuple[worker_pb2.PrefillCandidate, ...]
    """Prefill workers to ask, best first, each once."""
    outbox: Outbox
    clock: Clock
    decode_worker: str
    prefill: Prefill
    """HERE from the start, or ELSEWHERE: then it is decided when the prefix cache has been looked at."""
    deadline_s: float | None = None
    """From arrival; None: none."""
    retention: Retention = Retention()  # noqa: RUF009 - frozen
    fetch: common_pb2.FetchPlan | None = None
    """What to fetch before it is queued, where the prompt is computed here; once."""
    prefetched: Prefetched = NOTHING
    arrived_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float | None = None
    cached_tokens: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once nobody waits for its tokens any more."""
    expiry: asyncio.TimerHandle | None = None
    remote_prefill: "asyncio.Task[None] | None" = None
    """Set while a prefill worker may write into this request's blocks."""
    started: worker_pb2.PrefillStarted | None = None
    commit: worker_pb2.PrefillCommit | None = None
    prefill_worker: str = ""
    candidates_asked: int = 0
    failed_prefill_workers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arrived_s = self.clock()

    @property
    def known_tokens(self) -> int:
        """What is to be computed before its next token can be drawn."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining_s(self) -> float:
        """Until its deadline; may be negative."""
        return inf if self.deadline_s is None else self.arrived_s + self.deadline_s - self.clock()

    @property
    def has_candidates(self) -> bool:
        """That were not asked yet."""
        return self.candidates_asked < len(self.candidates)

    def next_candidate(self) -> worker_pb2.PrefillCandidate | None:
        if not self.has_candidates:
            return None
        self.candidates_asked += 1
        return self.candidates[self.candidates_asked - 1]

    def admit(self, event: Admitted) -> None:
        self.admitted_s = self.clock()
        self.cached_tokens = event.cached_tokens

    def committed(self, worker_id: str, started: worker_pb2.PrefillStarted, commit: worker_pb2.PrefillCommit) -> None:
        self.prefill_worker, self.started, self.commit = worker_id, started, commit

    @property
    def tokens_not_computed(self) -> int:
        """Known tokens that were in either worker's prefix cache."""
        return max(self.cached_tokens, self.started.cached_tokens if self.started else 0)

    def timeline(self, last: Generated) -> common_pb2.Timeline:
        now_s = self.clock()
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        timeline = common_pb2.Timeline(
            queue_s=max(self.admitted_s - self.arrived_s - self.prefetched.seconds, 0.0),
            prefill_s=first_token_s - self.admitted_s,
            first_token_s=first_token_s - self.arrived_s,
            decode_s=now_s - first_token_s,
            decode_worker=self.decode_worker,
            cached_tokens=self.cached_tokens,
            preemptions=last.preemptions,
            restored_tokens=last.restored_tokens,
            restore_s=last.restore_s,
            fetched_tokens=self.prefetched.tokens,
            fetch_s=self.prefetched.seconds,
        )
        if self.started and self.commit:
            timeline.MergeFrom(_elsewhere(self.prefill_worker, self.started, self.commit))
            # Not merged: a zero says something here.
            timeline.restored_tokens, timeline.restore_s = self.commit.restored_tokens, self.commit.restore_s
            timeline.fetched_tokens, timeline.fetch_s = self.started.fetched_tokens, self.started.fetch_s
        return timeline


def _elsewhere(
    worker_id: str, started: worker_pb2.PrefillStarted, commit: worker_pb2.PrefillCommit
) -> common_pb2.Timeline:
    return common_pb2.Timeline(
        prefill_queue_s=started.queue_s,
        prefill_s=commit.prefill_s,
        transfer_s=commit.transfer_s,
        transfer_exposed_s=commit.transfer_exposed_s,
        transfer_bytes=commit.transfer_bytes,
        transport=started.transport,
        prefill_worker=worker_id,
        prefill_cached_tokens=started.cached_tokens,
    )
