"""The pure part of placement: what things cost, and which pair costs least."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cluster.worker_info import Load, WorkerInfo
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from router.index.prefixes import Prefixes
from router.placement.candidates import candidate
from router.placement.demand import Demand
from router.placement.fleet import Fleet
from router.placement.price import Costs, Pair, cheapest_pairs, exposed_transfer_s, pair_of, price, shared_steps
from router.placement.worker_load import WorkerLoad
from tests.router.placement_rig import BLOCK_TOKENS, LATENCY, a_request, a_worker

NOW_S = 50.0


@dataclass(frozen=True)
class Prefix:
    hbm: int = 0
    ddr: int = 0
    ssd: int = 0


def a_priced_fleet(
    workers: list[WorkerInfo], tokens: int = 1000, lengths: Mapping[int, Prefix] | None = None, ties_seed: int = 1
) -> Costs:
    fleet = Fleet([WorkerLoad(worker, NOW_S) for worker in workers], Demand(NOW_S), NOW_S)
    ties_s = np.array([Random(ties_seed + number).random() * 1e-9 for number in range(len(workers))])
    return price(fleet, a_request(tokens), Prefixes.of(lengths or {}, len(workers)), ties_s, NOW_S)


def all_pairs(costs: Costs) -> list[Pair]:
    fleet = costs.fleet
    decode = range(fleet.prefill_count, len(fleet.loads))
    pairs = [pair_of(costs, compute, column) for column in decode for compute in (*range(fleet.prefill_count), column)]
    return sorted((pair for pair in pairs if math.isfinite(pair.cost_s)), key=lambda pair: pair.cost_s)


seconds = st.floats(0, 0.1)
latencies = st.builds(
    WorkerLatency,
    st.builds(PrefillCost, seconds, st.floats(0, 1e-3), st.floats(0, 1e-7)),
    st.builds(DecodeCost, seconds, st.floats(0, 1e-3), st.floats(0, 1e-6)),
    st.builds(TransferCost, st.sampled_from([0.0, 0.001, 0.1]), st.sampled_from([1e8, 1e9, 1e11])),
)
loads = st.builds(
    Load,
    running_sequences=st.integers(0, 300),
    waiting_tokens=st.integers(0, 20_000),
    kv_blocks_used=st.integers(0, 110_000),
    kv_tokens=st.integers(0, 50_000),
    arrivals_per_s=st.floats(0, 10),
)


@st.composite
def priced_fleets(draw: st.DrawFn) -> Costs:
    kinds = draw(st.lists(latencies, min_size=1, max_size=3))
    roles = ["prefill"] * draw(st.integers(0, 9)) + ["decode"] * draw(st.integers(1, 9))
    workers = [
        a_worker(f"w{number}", role, latency=draw(st.sampled_from(kinds)), load=draw(loads))
        for number, role in enumerate(roles)
    ]
    tokens = draw(st.integers(1, 30_000))
    prefixes = st.builds(Prefix, st.sampled_from([0, 1, 10, tokens // BLOCK_TOKENS]))
    lengths = draw(st.dictionaries(st.integers(0, len(workers) - 1), prefixes))
    costs = a_priced_fleet(workers, tokens, lengths, draw(st.integers(0, 99)))
    for column in draw(st.sets(st.integers(0, len(workers) - 1), max_size=3)):
        costs.exclude(column)
    return costs


@settings(deadline=None, max_examples=200)
@given(costs=priced_fleets(), count=st.integers(1, 8))
def test_branch_and_bound_finds_what_brute_force_finds(costs: Costs, count: int) -> None:
    found, every = cheapest_pairs(costs, count), all_pairs(costs)
    assert [pair.cost_s for pair in found] == pytest.approx([pair.cost_s for pair in every[:count]])
    assert len({(pair.compute, pair.decode) for pair in found}) == len(found)
    assert costs.considered == len(every)


@settings(deadline=None, max_examples=100)
@given(costs=priced_fleets())
def test_a_dominated_pair_is_never_chosen(costs: Costs) -> None:
    def terms(pair: Pair) -> list[float]:
        found = candidate(pair).terms
        return [getattr(found, name) for name in found.__slots__]

    every = all_pairs(costs)
    if not every:
        return
    best = terms(cheapest_pairs(costs, 1)[0])
    for pair in every:
        other = terms(pair)
        is_no_worse = all(theirs <= ours for theirs, ours in zip(other, best, strict=True))
        assert not (is_no_worse and sum(best) - sum(other) > 1e-6)


@settings(deadline=None, max_examples=100)
@given(costs=priced_fleets())
def test_terms_add_up_to_what_a_pair_was_chosen_by(costs: Costs) -> None:
    for pair in cheapest_pairs(costs, 8):
        found = candidate(pair)
        assert found.terms.total_s == pytest.approx(pair.cost_s, abs=1e-6)
        assert all(getattr(found.terms, name) >= 0 for name in found.terms.__slots__)


@settings(deadline=None)
@given(
    before=loads,
    more=st.fixed_dictionaries(
        {name: st.integers(0, 2000) for name in ("running_sequences", "waiting_tokens", "kv_blocks_used", "kv_tokens")}
    ),
    role=st.sampled_from(["prefill", "decode"]),
)
def test_load_never_makes_a_worker_cheaper(before: Load, more: dict[str, int], role: str) -> None:
    after = before.model_copy(update={name: getattr(before, name) + extra for name, extra in more.items()})
    costs = [
        a_priced_fleet([a_worker("p", "prefill", load=load if role == "prefill" else None), a_worker("d", load=load)])
        for load in (before, after)
    ]
    for compute in (0, 1):
        assert pair_of(costs[1], compute, 1).cost_s >= pair_of(costs[0], compute, 1).cost_s - 1e-9


@given(
    tokens=st.integers(1, 200_000), blocks=st.integers(0, 10_000), chunk_s=seconds, token_s=seconds, context_s=seconds
)
def test_prefill_takes_what_the_latency_model_says(
    tokens: int, blocks: int, chunk_s: float, token_s: float, context_s: float
) -> None:
    cost = PrefillCost(chunk_s, token_s, context_s)
    worker = a_worker("d", latency=WorkerLatency(cost, LATENCY.decode, LATENCY.transfer))
    costs = a_priced_fleet([worker], tokens, {0: Prefix(hbm=blocks)})
    cached = min(blocks, (tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
    assert costs.cached_tokens[0] == cached, "whole blocks, and never the last token"
    assert costs.prefill_s[0] == pytest.approx(cost.prompt_time_s(tokens - cached, cached, worker.chunk_tokens))


def test_a_transfer_is_hidden_as_far_as_the_prefill_lasts() -> None:
    tokens, block_bytes = 1600, BLOCK_TOKENS * 100_000

    def exposed_s(bytes_per_s: float, held_by_decode: int = 0) -> float:
        link = WorkerLatency(LATENCY.prefill, LATENCY.decode, TransferCost(0.002, bytes_per_s))
        workers = [a_worker("p", "prefill", latency=link), a_worker("d", latency=link)]
        costs = a_priced_fleet(workers, tokens, {1: Prefix(hbm=held_by_decode)})
        return float(exposed_transfer_s(costs, 1)[0])

    prefill_s = LATENCY.prefill.prompt_time_s(tokens, 0, 512)
    assert exposed_s(1e12) == pytest.approx(0.002 + 512 * 100_000 / 1e12), "all but the last chunk"
    assert exposed_s(1e9) == pytest.approx(0.002 + 100 * block_bytes / 1e9 - prefill_s), "the link is the slower"
    assert exposed_s(1e9, held_by_decode=99) == pytest.approx(0.002 + block_bytes / 1e9), "only what is lacking"


def test_the_slower_end_sets_a_links_pace() -> None:
    slow = WorkerLatency(LATENCY.prefill, LATENCY.decode, TransferCost(0.5, 1e8))
    for prefill, decode in ((slow, LATENCY), (LATENCY, slow), (slow, slow)):
        workers = [a_worker("p", "prefill", latency=prefill), a_worker("d", latency=decode)]
        exposed_s = exposed_transfer_s(a_priced_fleet(workers, 16), 1)[0]
        assert exposed_s == pytest.approx(0.5 + BLOCK_TOKENS * 100_000 / 1e8)


@pytest.mark.parametrize("expected_tokens", [1, 50, 99, 150, 200, 1000])
def test_steps_shared_with_those_that_run_are_the_mean_over_what_they_may_have_left(expected_tokens: int) -> None:
    left = 100.0  # of 4 sequences, none to 200 each
    fleet = Fleet([WorkerLoad(a_worker("d", load=Load(running_sequences=4)), NOW_S)], Demand(NOW_S), NOW_S)
    fleet.remaining_tokens[0] = left
    drawn = np.linspace(0, 2 * left, 100_001)
    assert shared_steps(fleet, expected_tokens)[0] == pytest.approx(4 * np.minimum(drawn, expected_tokens).mean(), 1e-4)


def test_blocks_in_lower_tiers_are_restored_as_far_as_that_is_quicker_than_computing() -> None:
    quick, slow = TransferCost(0.001, 1e10), TransferCost(10.0, 1e10)
    lengths = {0: Prefix(hbm=10, ddr=20, ssd=30)}
    block_bytes = BLOCK_TOKENS * 100_000
    cases: list[tuple[dict[str, TransferCost], int, float]] = [
        ({"ddr": quick, "ssd": quick}, 60, 0.002 + 50 * block_bytes / 1e10),
        ({"ddr": quick, "ssd": slow}, 30, 0.001 + 20 * block_bytes / 1e10),
        ({"ddr": slow, "ssd": slow}, 10, 0.0),
        ({"ssd": quick}, 10, 0.0),  # nothing brings back what comes before
    ]
    for restore, blocks, restore_s in cases:
        latency = WorkerLatency(LATENCY.prefill, LATENCY.decode, LATENCY.transfer, restore)  # type: ignore[arg-type]
        costs = a_priced_fleet([a_worker("d", latency=latency)], 16 * 1000, lengths)
        assert (costs.cached_tokens[0], costs.restore_s[0]) == (blocks * BLOCK_TOKENS, pytest.approx(restore_s))


def test_blocks_that_push_out_others_cost_as_much_as_those_are_worth() -> None:
    full, roomy = Load(kv_blocks_cached=99_990), Load(kv_blocks_cached=1000)
    demand = Demand(NOW_S)
    demand.observe(NOW_S, 600, 400, pooled=True)
    loads = [WorkerLoad(a_worker(name, "prefill", load=load), NOW_S) for name, load in (("p1", full), ("p2", roomy))]
    fleet = Fleet([*loads, WorkerLoad(a_worker("d"), NOW_S)], demand, NOW_S)
    costs = price(fleet, a_request(1600), Prefixes.of({}, 3), np.zeros(3), NOW_S)
    token_s = LATENCY.prefill.token_s + LATENCY.prefill.chunk_s / 512 + LATENCY.prefill.token_context_s * 700
    assert costs.others_evicted_s.tolist() == pytest.approx([(100 - 10) * 0.4 * BLOCK_TOKENS * token_s, 0, 0])


def test_no_room_on_a_decode_worker_is_a_wait_for_as_many_as_must_end_first() -> None:
    cases = {
        "roomy": (Load(running_sequences=10, kv_blocks_used=1000), 256),
        "full": (Load(running_sequences=10, kv_blocks_used=98_400), 256),
        "fuller": (Load(running_sequences=10, kv_blocks_used=120_000), 256),
        "no seats": (Load(running_sequences=10, kv_blocks_used=1000), 10),
    }
    workers = [a_worker(name, load=load, sequences_max=most) for name, (load, most) in cases.items()]
    admission_s = dict(zip(cases, a_priced_fleet(workers, 3200).admission_s.tolist(), strict=True))
    half_a_step_s = LATENCY.decode.step_time_s(10, 0) / 2
    assert admission_s["roomy"] == pytest.approx(half_a_step_s)
    assert admission_s["full"] > half_a_step_s
    assert admission_s["fuller"] > admission_s["full"]
    assert admission_s["no seats"] > half_a_step_s


def test_work_costs_more_where_even_the_shortest_queue_lasts_until_others_come() -> None:
    def others_and_work_s(*waiting_tokens: int) -> tuple[float, float]:
        workers = [
            a_worker(f"p{number}", "prefill", load=Load(waiting_tokens=tokens, arrivals_per_s=2.0))
            for number, tokens in enumerate(waiting_tokens)
        ]
        costs = a_priced_fleet([*workers, a_worker("d")], 1600)
        return float(costs.others_queue_s[0]), float(costs.prefill_s[0])

    assert others_and_work_s(5000, 0)[0] == 0, "who comes next goes to the other one"
    others_s, work_s = others_and_work_s(10_000, 5120)
    half_of_the_running_chunk = 0.95  # of ten
    shortest_s = half_of_the_running_chunk * (10 * LATENCY.prefill.chunk_s + 5120 * LATENCY.prefill.token_s)
    assert others_s == pytest.approx(2.0 * shortest_s * work_s)
