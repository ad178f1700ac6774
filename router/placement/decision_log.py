"""Why each request was placed where it was, and what became of it: the latest ones, in memory."""

from collections import OrderedDict
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

from baton.clock import Clock
from baton.ids import RequestId
from baton.rpc import common_pb2, inference_pb2
from router.placement.decision import CachedTokens, Candidate, Decision, Excluded, Terms

Outcome = Literal["running", "finished", "failed", "cancelled"]
_TERMS = (*(term.name for term in fields(Terms)), "total_s", "ttft_s")
_MEASURED_BY_WORKER = (
    *("queue_s", "prefill_queue_s", "prefill_s", "transfer_exposed_s"),
    *("restored_tokens", "restore_s", "fetched_tokens", "fetch_s"),
)


class _Candidate(NamedTuple):
    """What is kept of a Candidate: not the workers' records, a new one of which comes with every heartbeat."""

    decode_worker: str
    prefill_worker: str
    pool: str
    terms: Terms
    itl_s: float
    cached_tokens: CachedTokens
    decode_cached_tokens: CachedTokens
    fetch_from: str


class _Kept(NamedTuple):
    """What is kept of a Decision."""

    policy: str
    prompt_tokens: int
    considered: int
    candidates: tuple[_Candidate, ...]
    margin_s: float
    excluded: tuple[Excluded, ...]


@dataclass(slots=True)
class PlacementRecord:
    """One placement. Whoever placed it says here what became of it."""

    choice: int
    attempt: int
    decided_at: float
    decided_in_s: float
    plan: Decision | _Kept
    """Brought into the form that is kept when it has ended: nobody waits for that."""
    actual: inference_pb2.Actual | None = None

    def first_token(self, ttft_s: float, cached_tokens: int, timeline: common_pb2.Timeline | None) -> None:
        """`timeline` is the worker's own account so far, where it gives one."""
        self.actual = inference_pb2.Actual(outcome="running", ttft_s=ttft_s, cached_tokens=cached_tokens)
        _copy_timeline(timeline, self.actual)

    def ended(
        self, outcome: Outcome, completion_tokens: int, itl_s: float, timeline: common_pb2.Timeline | None
    ) -> None:
        """0 for `itl_s`: no second token."""
        self.actual = actual = self.actual or inference_pb2.Actual()
        actual.outcome, actual.completion_tokens, actual.itl_s = outcome, completion_tokens, itl_s
        _copy_timeline(timeline, actual)
        self.plan = _kept(self.plan)


@dataclass(slots=True)
class RequestRecord:
    """All placements of one request, in their order."""

    request_id: RequestId
    tenant: str = ""
    placements: list[PlacementRecord] = field(default_factory=list)


class DecisionLog:
    """Holds `placements_max` placements at most, some 5 KB each; what belongs to the oldest requests goes first."""

    def __init__(self, placements_max: int, router_id: str, wall_clock: Clock) -> None:
        """`wall_clock`: seconds since 1970."""
        self._placements_max, self._router_id, self._wall_clock = placements_max, router_id, wall_clock
        self._requests: OrderedDict[RequestId, RequestRecord] = OrderedDict()
        self._placements = 0

    def record(
        self, request: RequestRecord, decision: Decision, decided_in_s: float, *, choice: int, attempt: int
    ) -> PlacementRecord:
        """`attempt` counts from 1, for each of the request's choices. A client may use an id again: with the first
        placement of the later request, what was known under it is forgotten."""
        placement = PlacementRecord(choice, attempt, self._wall_clock(), decided_in_s, decision)
        if not request.placements:
            self._forget(request.request_id)
            self._requests[request.request_id] = request
        request.placements.append(placement)
        if self._requests.get(request.request_id) is request:
            self._placements += 1
            while self._placements > self._placements_max:
                self._forget(next(iter(self._requests)))
        return placement

    def get(self, request_id: RequestId) -> inference_pb2.Decision | None:
        """None for what is forgotten, or was never placed here."""
        if (request := self._requests.get(request_id)) is None:
            return None
        placements = [self._to_proto(placement) for placement in request.placements]
        return inference_pb2.Decision(request_id=request_id, placements=placements, tenant=request.tenant)

    def _forget(self, request_id: RequestId) -> None:
        if (request := self._requests.pop(request_id, None)) is not None:
            self._placements -= len(request.placements)

    def _to_proto(self, placement: PlacementRecord) -> inference_pb2.PlacementDecision:
        plan = _kept(placement.plan)
        return inference_pb2.PlacementDecision(
            choice=placement.choice,
            attempt=placement.attempt,
            policy=plan.policy,
            decided_at=placement.decided_at,
            decided_in_s=placement.decided_in_s,
            router=self._router_id,
            prompt_tokens=plan.prompt_tokens,
            candidates_considered=plan.considered,
            candidates=map(_candidate_to_proto, plan.candidates),
            margin_s=plan.margin_s,
            excluded=[inference_pb2.Excluded(worker=one.worker_id, reason=one.reason) for one in plan.excluded],
            actual=placement.actual,
        )


def _copy_timeline(timeline: common_pb2.Timeline | None, actual: inference_pb2.Actual) -> None:
    if timeline is not None:
        actual.prefill_worker = timeline.prefill_worker
        for name in _MEASURED_BY_WORKER:
            setattr(actual, name, getattr(timeline, name))


def _kept(plan: Decision | _Kept) -> _Kept:
    if isinstance(plan, _Kept):
        return plan
    others = tuple(plan.others)
    margin_s = others[0].terms.total_s - plan.chosen.terms.total_s if others else 0.0
    candidates = tuple(map(_kept_candidate, (plan.chosen, *others)))
    return _Kept(plan.policy, plan.prompt_tokens, plan.considered, candidates, margin_s, plan.excluded)


def _kept_candidate(candidate: Candidate) -> _Candidate:
    return _Candidate(
        candidate.decode.worker_id,
        candidate.prefill.worker_id if candidate.prefill else "",
        candidate.decode.pool,
        candidate.terms,
        candidate.itl_s,
        candidate.cached_tokens,
        candidate.decode_cached_tokens,
        candidate.fetch.worker.worker_id if candidate.fetch else "",
    )


def _candidate_to_proto(candidate: _Candidate) -> inference_pb2.Candidate:
    return inference_pb2.Candidate(
        decode_worker=candidate.decode_worker,
        prefill_worker=candidate.prefill_worker,
        pool=candidate.pool,
        itl_s=candidate.itl_s,
        cached_tokens_hbm=candidate.cached_tokens.hbm,
        cached_tokens_ddr=candidate.cached_tokens.ddr,
        cached_tokens_ssd=candidate.cached_tokens.ssd,
        decode_cached_tokens=candidate.decode_cached_tokens.total,
        cached_tokens_peer=candidate.cached_tokens.peer,
        fetch_from=candidate.fetch_from,
        **{name: getattr(candidate.terms, name) for name in _TERMS},
    )
