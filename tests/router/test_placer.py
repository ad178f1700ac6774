"""The placer: what it keeps account of, and where it sends requests in the end."""

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cluster.router_info import PlacedLoad
from baton.cluster.worker_info import Load, WorkerInfo
from baton.errors import Unavailable
from baton.ids import WorkerId
from baton.latency import WorkerLatency
from router.placement.block_names import BlockKind, BlockNames
from router.placement.placer import CANDIDATES_MAX, TIE_S
from router.placement.price import LIKELY_TO_COME, PlacementRequest
from tests.router.placement_rig import BLOCK_TOKENS, BUSY, LATENCY, Rig, a_fleet, a_request, a_worker, pair_of, slowed


def test_a_placed_request_counts_at_once_and_until_it_ends() -> None:
    rig = Rig(a_fleet(2, 2))
    placed = [rig.place(a_request(1000, number)) for number in range(4)]
    for workers in zip(*(pair_of(decision) for _, decision in placed), strict=True):
        assert sorted(Counter(workers).values()) == [2, 2]
    prefill_tokens = sum(load.prefill_tokens for load in rig.placer.placed().values())
    assert prefill_tokens == 4000
    for sequence_id, _ in placed:
        rig.placer.first_token(sequence_id)
        rig.placer.first_token(sequence_id)
    assert {load.prefill_tokens for load in rig.placer.placed().values()} == {0}
    assert sum(load.kv_tokens for load in rig.placer.placed().values()) == 4000
    for sequence_id, _ in placed:
        rig.placer.finished(sequence_id)
        rig.placer.finished(sequence_id)
    assert rig.placer.placed() == {}


@settings(deadline=None, max_examples=50)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["place", "token", "progress", "finish", "wait", "report"]), st.integers(0, 99)),
        max_size=60,
    )
)
def test_accounts_return_to_zero_whatever_happens_in_between(steps: list[tuple[str, int]]) -> None:
    workers = a_fleet(2, 3)
    rig, going = Rig(workers), []
    idle_s = rig.placer.queue_s("m")
    empty = [(load.info.worker_id, rig.placer._fleet_of[load].queue_least_s.tolist()) for load in rig.placer._fleet_of]
    for step, number in steps:
        if step == "place":
            going.append(rig.place(a_request(1 + 37 * number, number % 5))[0])
        elif step == "wait":
            rig.clock.advance(number / 50)
        elif step == "report":
            rig.placer.set_workers([worker.model_copy() for worker in workers])
        elif going:
            sequence_id = going[number % len(going)]
            if step == "token":
                rig.placer.first_token(sequence_id)
            elif step == "progress":
                rig.placer.progress(sequence_id, number)
            else:
                going.remove(sequence_id)
                rig.placer.finished(sequence_id)
    for sequence_id in going:
        rig.placer.finished(sequence_id)
    assert rig.placer.placed() == {}
    for load in rig.placer._fleet_of:
        assert (load.unreported_s, load.unreported_tokens, load.prefill_tokens, load.waiting_prompts) == (0, 0, 0, 0)
        assert (load.sequences, load.kv_tokens, load.kv_blocks, load.remaining_tokens, load.stay_s) == (0, 0, 0, 0, 0)
    rig.clock.advance(60)
    rig.placer.set_workers([worker.model_copy() for worker in workers])
    assert rig.placer.queue_s("m") == idle_s
    assert empty == [
        (load.info.worker_id, rig.placer._fleet_of[load].queue_least_s.tolist()) for load in rig.placer._fleet_of
    ]


def test_what_it_says_about_a_decision() -> None:
    rig = Rig(a_fleet(5, 4))
    for number in range(20):
        _, decision = rig.place(a_request(500 + 100 * number, number))
        candidates = [decision.chosen, *decision.others]
        assert len(candidates) == CANDIDATES_MAX
        assert decision.considered == 5 * 4 + 4
        costs = [candidate.terms.total_s for candidate in candidates]
        assert all(costs[0] <= cost + 2 * TIE_S for cost in costs)
        assert all(one <= other + 2 * TIE_S for one, other in pairwise(costs))
        names = [(one.prefill and one.prefill.worker_id, one.decode.worker_id) for one in candidates]
        assert len(set(names)) == CANDIDATES_MAX
        assert decision.margin_s == pytest.approx(costs[1] - costs[0])
        fallbacks = [fallback.worker.worker_id for fallback in decision.prefill_fallbacks]
        assert len(fallbacks) == 2
        assert pair_of(decision)[0] not in fallbacks


def test_equal_workers_get_equal_shares_though_none_is_ever_busy() -> None:
    rig = Rig(a_fleet(4, 4))
    prefill, decode = Counter[str | None](), Counter[str | None]()
    for number in range(800):
        name, other = pair_of(rig.serve(a_request(1000, number)))
        prefill[name] += 1
        decode[other] += 1
        rig.clock.advance(10)
    for shares in (prefill, decode):
        assert len(shares) == 4
        assert max(shares.values()) < 1.3 * min(shares.values())


def test_with_nothing_cached_it_balances_load() -> None:
    rig, random = Rig(a_fleet(4, 0) + a_fleet(0, 2)), Random(1)
    for number in range(200):
        rig.place(a_request(random.randrange(200, 8000), number, expected_tokens=10))
    placed = rig.placer.placed()
    waiting = [placed[WorkerId(f"p{number}")].prefill_tokens for number in range(4)]
    assert max(waiting) < 1.2 * min(waiting)


def test_a_worker_that_became_slow_gets_less() -> None:
    workers = a_fleet(3, 3)
    slow = {"p0", "d0"}

    def shares(workers: list[WorkerInfo]) -> Counter[str]:
        rig, chosen, going = Rig(workers), Counter[str](), []
        for number in range(300):
            sequence_id, decision = rig.place(a_request(2000, number))
            chosen.update(name for name in pair_of(decision) if name)
            going.append(sequence_id)
            rig.clock.advance(0.02)
            if len(going) > 12:
                rig.placer.finished(going.pop(0))
        return chosen

    equal = shares(workers)
    unequal = shares([w.model_copy(update={"latency": slowed(3)}) if w.worker_id in slow else w for w in workers])
    for name in slow:
        assert unequal[name] < 0.6 * equal[name]


def test_a_prompt_goes_where_its_prefix_is_until_load_outweighs_it() -> None:
    rig = Rig(a_fleet(3, 1))
    prompt = a_request(4000, "long")
    rig.hold("p1", prompt)
    decision = rig.placer.place(prompt)
    assert pair_of(decision)[0] == "p1"
    assert decision.chosen.cached_tokens.hbm == 249 * 16  # a whole number of blocks, but the last token is computed
    for number in range(20):
        load = Load(waiting_tokens=1000 * number)
        rig.placer.set_workers([*a_fleet(1, 1), a_worker("p1", "prefill", load=load), a_worker("p2", "prefill")])
        if pair_of(rig.placer.place(prompt))[0] != "p1":
            break
    assert 3 <= number <= 5, "about when waiting takes as long as computing 4,000 tokens"


def test_what_was_placed_is_expected_to_be_cached_before_any_event_tells() -> None:
    rig = Rig(a_fleet(4, 4))
    first = rig.serve(a_request(4000, "a"))
    rig.clock.advance(1)
    again = rig.serve(a_request(4016, "a"))
    assert again.chosen.cached_tokens.total == 4000
    assert pair_of(again)[0] in pair_of(first)


def test_a_decode_worker_that_holds_nearly_all_of_a_prompt_computes_the_rest_itself() -> None:
    rig = Rig(a_fleet(2, 2))
    turn = a_request(8000, "conversation")
    rig.hold("d1", turn, blocks=498)
    decision = rig.placer.place(turn)
    assert pair_of(decision) == (None, "d1")
    assert decision.prefill_fallbacks == ()
    assert decision.chosen.terms.transfer_s == 0


def test_prefill_on_a_decode_worker_costs_those_that_run_there() -> None:
    busy = Load(running_sequences=20, kv_tokens=20_000)
    rig = Rig([a_worker("p", "prefill"), a_worker("d", load=busy)])
    local = next(one for one in rig.placer.place(a_request(4000)).others if one.prefill is None)
    remote = rig.placer.place(a_request(4000)).chosen
    assert remote.prefill is not None
    stall_s = local.terms.others_decode_s - remote.terms.others_decode_s
    assert stall_s == pytest.approx((20 + LIKELY_TO_COME) * local.terms.prefill_s)


def test_simultaneous_prompts_may_overtake_each_other_so_a_long_one_keeps_off() -> None:
    rig = Rig([*a_fleet(2, 0), a_worker("d", load=Load(running_sequences=4, kv_tokens=10_000))])
    _, short = rig.place(a_request(100, "short"))
    behind = {pair_of(rig.placer.place(a_request(30_000, number)))[0] for number in range(20)}
    assert behind == {"p0", "p1"} - {pair_of(short)[0]}


def test_without_a_decode_worker_nobody_is_available() -> None:
    with pytest.raises(Unavailable):
        Rig(a_fleet(2, 0)).placer.place(a_request(10))
    rig = Rig(a_fleet(1, 1))
    with pytest.raises(Unavailable):
        rig.placer.place(a_request(10), {WorkerId("d0"): "it cools down"})
    with pytest.raises(Unavailable):
        rig.placer.place(a_request(10, model="another"))
    assert rig.placer.queue_s("another") == float("inf")


def test_who_is_out_of_the_question_is_named_with_the_reason() -> None:
    rig = Rig(
        [
            *a_fleet(2, 2),
            a_worker("small", "prefill", blocks=10),
            a_worker("stranger", "prefill", fingerprint="g"),
            a_worker("elsewhere", "prefill", model="n"),
        ]
    )
    decision = rig.placer.place(a_request(1000), {WorkerId("p0"): "it cools down for 2 s"})
    reasons = {one.worker_id: one.reason for one in decision.excluded}
    assert reasons.keys() == {"p0", "small", "stranger"}
    assert reasons[WorkerId("p0")] == "it cools down for 2 s"
    assert decision.considered == 1 * 2 + 2
    named = {one.prefill.worker_id for one in [decision.chosen, *decision.others] if one.prefill}
    assert named == {"p1"}
    assert decision.prefill_fallbacks == ()


def test_pools_of_one_model_are_all_candidates_but_pair_only_among_themselves() -> None:
    fast = slowed(0.2)
    rig = Rig(
        [
            *a_fleet(2, 2),
            a_worker("fast-p", "prefill", fingerprint="g", pool="h100", latency=fast),
            a_worker("fast-d", fingerprint="g", pool="h100", latency=fast, load=BUSY),
        ]
    )
    decisions = [rig.place(a_request(2000, number))[1] for number in range(200)]
    assert pair_of(decisions[0]) == ("fast-p", "fast-d")
    assert {decision.chosen.decode.pool for decision in decisions} == {"h100", "default"}
    assert decisions[0].considered == 2 * 2 + 2 + 1 + 1
    for decision in decisions:
        for one in [decision.chosen, *decision.others]:
            assert one.prefill is None or one.prefill.fingerprint == one.decode.fingerprint


def test_workers_of_other_block_sizes_pair_and_each_goes_by_its_own_names() -> None:
    """A prefill worker's KV is cut into the decode worker's blocks on the way."""
    small = a_worker("small-p", "prefill").model_copy(update={"block_tokens": 4, "kv_block_bytes": 400_000})
    rig = Rig([small, a_worker("p", "prefill", latency=slowed(3)), a_worker("d", load=BUSY)])
    names = BlockNames(range(1600))
    request = PlacementRequest("m", 1600, 100, names)
    decision = rig.serve(request)
    assert pair_of(decision) == ("small-p", "d")
    held = {slot: length.hbm for slots, length in rig.index.holders(names(BlockKind.of(small))) for slot in slots}
    assert held == {rig.index.slot_of(WorkerId("small-p")): 400}
    again = rig.placer.place(request).chosen
    assert again.cached_tokens.total == 1599 // 4 * 4 if again.prefill else again.cached_tokens.total == 1599 // 16 * 16
    assert again.decode_cached_tokens.total == 1599 // BLOCK_TOKENS * BLOCK_TOKENS
    assert rig.placer.unpaired == {}


def test_workers_that_nobody_can_take_kv_from_are_told_with_the_reason() -> None:
    rig = Rig([*a_fleet(1, 1), a_worker("stranger", "prefill", fingerprint="g")])
    assert rig.placer.unpaired == {"stranger": "no decode worker has the same weights and type of KV"}
    assert Rig([a_worker("early", "prefill")]).placer.unpaired == {}, "its decode worker may only be slow to start"


HALF_A_CHUNK_LESS = 0.95
"""Of ten chunks that a worker reports, half of the one that runs is done."""


def test_a_report_takes_the_place_of_what_was_assumed() -> None:
    rig = Rig(a_fleet(1, 1))
    step_s = rig.placer.queue_s("m")
    sequence_id, decision = rig.place(a_request(10_000))
    work_s = decision.chosen.terms.prefill_s
    assert decision.chosen.prefill is not None

    def queue_s() -> float:
        return rig.placer.queue_s("m") - step_s

    assert queue_s() == pytest.approx(work_s, abs=0.01)
    rig.clock.advance(work_s / 2)
    assert queue_s() == pytest.approx(work_s / 2, abs=0.01), "it is being computed"
    rig.clock.advance(1)
    reported = Load(waiting_tokens=5120, waiting_token_context=5120.0 * 7500)
    rig.placer.set_workers([a_worker("p0", "prefill", load=reported), a_worker("d0", load=BUSY)])
    left_s = (10 * 0.005 + 5120 * 5e-5 + 5120 * 7500 * 1e-9) * HALF_A_CHUNK_LESS
    assert queue_s() == pytest.approx(left_s, abs=0.01), "it takes longer than thought"
    rig.clock.advance(1)
    rig.placer.set_workers(a_fleet(1, 1))
    assert queue_s() == pytest.approx(0, abs=0.01), "it is not there any more, though no first token has come"
    rig.placer.finished(sequence_id)


def test_a_prompt_whose_decode_worker_has_no_room_does_not_wait_at_the_prefill_worker() -> None:
    full = Load(running_sequences=50, kv_tokens=60_000, kv_blocks_used=4000)
    rig = Rig([a_worker("p", "prefill"), a_worker("d", load=full, blocks=4000)])
    rig.place(a_request(100, "first", expected_tokens=400))
    _, decision = rig.place(a_request(20_000, expected_tokens=400))
    assert decision.chosen.terms.admission_s > 1
    assert decision.chosen.prefill is not None
    assert rig.placer._loads[WorkerId("p")].unreported_tokens <= 100


def test_the_load_of_peers_counts_and_goes_with_them() -> None:
    rig = Rig(a_fleet(2, 2))
    busy = PlacedLoad(prefill_tokens=50_000, sequences=30, kv_tokens=60_000, remaining_tokens=3000)
    rig.placer.set_peers({"one": {WorkerId("p0"): busy, WorkerId("gone"): busy}, "two": {WorkerId("d0"): busy}})
    assert {pair_of(rig.serve(a_request(1000, number))) for number in range(10)} == {("p1", "d1")}
    rig.placer.set_peers({})
    assert {pair_of(rig.serve(a_request(1000, number + 10)))[0] for number in range(30)} == {"p0", "p1"}


def test_a_worker_that_started_anew_has_nothing_and_one_that_only_was_away_has_its_load() -> None:
    rig = Rig(a_fleet(1, 1))
    request = a_request(4000)
    sequence_id, _ = rig.place(request)
    rig.placer.set_workers(a_fleet(0, 1))
    rig.placer.set_workers(a_fleet(1, 1))
    assert rig.placer.placed()[WorkerId("p0")].prefill_tokens == 4000
    rig.placer.set_workers([a_worker("p0", "prefill", epoch="2"), a_worker("d0", epoch="2", load=BUSY)])
    assert rig.placer.placed() == {}
    assert rig.placer.place(request).chosen.cached_tokens.total == 0
    rig.placer.finished(sequence_id)
    assert rig.placer.placed() == {}


def test_workers_that_come_and_go_leave_nothing_behind() -> None:
    rig = Rig(a_fleet(1, 1))
    for number in range(50):
        rig.placer.set_workers([a_worker(f"p-{number}", "prefill"), a_worker(f"d-{number}")])
        rig.serve(a_request(100, number))
    assert len(rig.placer._loads) == len(rig.placer._fleet_of) == 2
    assert len(rig.placer._demand) == 1
    assert not rig.placer._sequences


def test_a_sequence_that_outlives_what_was_expected_is_expected_to_go_on() -> None:
    rig = Rig(a_fleet(0, 1))
    sequence_id, _ = rig.place(a_request(100, expected_tokens=10))
    left = []
    for _ in range(40):
        rig.placer.progress(sequence_id, 1)
        left.append(rig.placer.placed()[WorkerId("d0")].remaining_tokens)
    assert left[:10] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 10]
    assert min(left) == 1
    assert rig.placer.placed()[WorkerId("d0")].kv_tokens == 140


def test_a_queue_at_every_prefill_worker_is_a_queue_and_room_on_one_decode_worker_is_none() -> None:
    waiting = Load(waiting_tokens=5120)
    queued = [a_worker("p0", "prefill", load=waiting), a_worker("p1", "prefill", load=waiting)]
    full = a_worker("full", load=Load(running_sequences=10, kv_blocks_used=100_000))
    assert Rig([*queued, a_worker("d")]).placer.queue_s("m") == pytest.approx(
        (10 * 0.005 + 5120 * 5e-5) * HALF_A_CHUNK_LESS
    )
    assert Rig([*queued, a_worker("p2", "prefill"), a_worker("d")]).placer.queue_s("m") == 0
    assert Rig([a_worker("p", "prefill"), a_worker("d"), full]).placer.queue_s("m") == 0
    assert Rig([a_worker("p", "prefill"), full]).placer.queue_s("m") > 0.01


def test_a_worker_of_another_latency_is_another_price_at_its_next_record() -> None:
    rig = Rig(a_fleet(2, 1))
    quick = WorkerLatency(slowed(0.1).prefill, LATENCY.decode, LATENCY.transfer)
    rig.placer.set_workers([a_worker("p0", "prefill"), a_worker("p1", "prefill", latency=quick), a_worker("d0")])
    assert {pair_of(rig.serve(a_request(3000, number)))[0] for number in range(5)} == {"p1"}
