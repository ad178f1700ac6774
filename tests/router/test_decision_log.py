from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.worker_info import Role, WorkerInfo
from baton.ids import RequestId, WorkerId
from baton.rpc import common_pb2, inference_pb2
from router.placement.decision import CachedTokens, Candidate, Decision, Excluded, Fetch, Terms
from router.placement.decision_log import DecisionLog, PlacementRecord, RequestRecord

REQUEST = RequestId("r")
NOW = 1_700_000_000.0


def worker(name: str, role: Role = "decode") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        role=role,
        state="ready",
        address="127.0.0.1:1",
        model="m",
        fingerprint="f",
        context_length=1,
        vocabulary_size=1,
        block_tokens=1,
        kv_dtype="float32",
        kv_blocks_total=1,
        epoch="1",
        pool="h100",
    )


def candidate(decode: str, prefill: str | None, **terms: float) -> Candidate:
    return Candidate(
        worker(decode),
        worker(prefill, "prefill") if prefill else None,
        Terms(**terms),
        itl_s=0.01,
        cached_tokens=CachedTokens(hbm=32, ddr=16),
        decode_cached_tokens=CachedTokens(hbm=8, ssd=8),
    )


DECISION = Decision(
    policy="least-added-latency",
    chosen=candidate("d1", "p1", queue_s=1.0, prefill_s=2.0, transfer_s=0.5, others_decode_s=0.25),
    prefill_fallbacks=(),
    others=(candidate("d2", None, prefill_s=5.0),),
    considered=4,
    excluded=(Excluded(WorkerId("d3"), "draining"),),
    prompt_tokens=64,
    expected_tokens=100.0,
)


def log(placements_max: int = 10) -> DecisionLog:
    return DecisionLog(placements_max, "router-1", lambda: NOW)


def record(decisions: DecisionLog, request_id: RequestId = REQUEST, attempt: int = 1) -> PlacementRecord:
    return decisions.record(RequestRecord(request_id), DECISION, 0.0001, choice=0, attempt=attempt)


def told(decisions: DecisionLog, request_id: RequestId = REQUEST) -> inference_pb2.Decision:
    decision = decisions.get(request_id)
    assert decision is not None
    return decision


def test_a_decision_is_told_with_every_term() -> None:
    decisions = log()
    record(decisions)
    (placement,) = told(decisions).placements
    assert (placement.choice, placement.attempt, placement.router) == (0, 1, "router-1")
    assert (placement.policy, placement.decided_at, placement.decided_in_s) == ("least-added-latency", NOW, 0.0001)
    assert (placement.prompt_tokens, placement.candidates_considered) == (64, 4)
    assert placement.margin_s == 5.0 - 3.75
    assert [(one.worker, one.reason) for one in placement.excluded] == [("d3", "draining")]
    chosen, other = placement.candidates
    assert (chosen.decode_worker, chosen.prefill_worker, chosen.pool) == ("d1", "p1", "h100")
    assert (chosen.queue_s, chosen.prefill_s, chosen.transfer_s, chosen.others_decode_s) == (1.0, 2.0, 0.5, 0.25)
    assert (chosen.ttft_s, chosen.total_s, chosen.itl_s) == (3.5, 3.75, 0.01)
    assert (chosen.cached_tokens_hbm, chosen.cached_tokens_ddr, chosen.cached_tokens_ssd) == (32, 16, 0)
    assert chosen.decode_cached_tokens == 16
    assert (other.decode_worker, other.prefill_worker) == ("d2", "")
    assert not placement.HasField("actual")


def test_a_fetch_is_told_by_its_worker_and_tokens() -> None:
    fetch = Fetch(worker("p9", "prefill"), 48, 16, 0.1, 0.5)
    chosen = replace(DECISION.chosen, cached_tokens=CachedTokens(hbm=32, peer=16), fetch=fetch)
    decisions = log()
    decisions.record(RequestRecord(REQUEST), replace(DECISION, chosen=chosen), 0.0001, choice=0, attempt=1)
    first, second = told(decisions).placements[0].candidates
    assert (first.cached_tokens_hbm, first.cached_tokens_peer, first.fetch_from) == (32, 16, "p9")
    assert (second.cached_tokens_peer, second.fetch_from) == (0, "")


def test_every_term_has_a_field() -> None:
    fields = inference_pb2.Candidate.DESCRIPTOR.fields_by_name
    assert all(name in fields for name in Terms.__slots__)
    decisions = log()
    terms = {name: float(number) for number, name in enumerate(Terms.__slots__, 1)}
    chosen = candidate("d1", "p1", **terms)
    own = Decision("random", chosen, (), (), 1, (), 1, 1.0)
    decisions.record(RequestRecord(REQUEST), own, 0.0, choice=0, attempt=1)
    told_terms = told(decisions).placements[0].candidates[0]
    assert {name: getattr(told_terms, name) for name in terms} == terms
    assert told_terms.total_s == sum(terms.values())


def test_what_became_of_it_is_filled_in() -> None:
    decisions = log()
    placement = record(decisions)
    placement.first_token(0.5, cached_tokens=48, timeline=None)
    actual = told(decisions).placements[0].actual
    assert (actual.outcome, actual.ttft_s, actual.cached_tokens) == ("running", 0.5, 48)
    timeline = common_pb2.Timeline(
        queue_s=0.1, prefill_queue_s=0.2, prefill_s=0.3, transfer_exposed_s=0.4, prefill_worker="p2"
    )
    placement.ended("finished", completion_tokens=7, itl_s=0.02, timeline=timeline)
    actual = told(decisions).placements[0].actual
    assert (actual.outcome, actual.completion_tokens, actual.itl_s, actual.ttft_s) == ("finished", 7, 0.02, 0.5)
    waits = (actual.queue_s, actual.prefill_queue_s, actual.prefill_s, actual.transfer_exposed_s)
    assert waits == (0.1, 0.2, 0.3, 0.4)
    assert actual.prefill_worker == "p2"


def test_what_failed_before_its_first_token_says_so() -> None:
    decisions = log()
    record(decisions).ended("failed", 0, 0.0, None)
    assert told(decisions).placements[0].actual.outcome == "failed"


def test_choices_and_attempts_are_listed_in_order() -> None:
    decisions = log()
    request = RequestRecord(REQUEST)
    for choice, attempt in ((0, 1), (1, 1), (0, 2)):
        decisions.record(request, DECISION, 0.0, choice=choice, attempt=attempt)
    placements = told(decisions).placements
    assert [(one.choice, one.attempt) for one in placements] == [(0, 1), (1, 1), (0, 2)]


def test_of_an_id_used_twice_the_latest_request_is_told() -> None:
    decisions = log()
    first = RequestRecord(REQUEST)
    decisions.record(first, DECISION, 0.0, choice=0, attempt=1)
    second = RequestRecord(REQUEST)
    decisions.record(second, DECISION, 1.0, choice=0, attempt=1)
    decisions.record(first, DECISION, 2.0, choice=0, attempt=2)  # the first one is still running
    assert [one.decided_in_s for one in told(decisions).placements] == [1.0]


def test_unknown_requests_are_none() -> None:
    assert log().get(REQUEST) is None


def test_nothing_is_kept_where_nothing_may_be() -> None:
    decisions = log(0)
    record(decisions).ended("finished", 1, 0.0, None)
    assert decisions.get(REQUEST) is None


@given(st.integers(0, 5), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 3)), max_size=30))
def test_it_is_bounded_and_keeps_the_latest(placements_max: int, requests: list[tuple[str, int]]) -> None:
    decisions = log(placements_max)
    for name, placements in requests:
        request = RequestRecord(RequestId(name))
        for attempt in range(1, placements + 1):
            decisions.record(request, DECISION, 0.0, choice=0, attempt=attempt)
        kept = [decision for one in "abcdef" if (decision := decisions.get(RequestId(one))) is not None]
        assert sum(len(decision.placements) for decision in kept) <= placements_max
        if placements <= placements_max:
            assert len(told(decisions, RequestId(name)).placements) == placements
