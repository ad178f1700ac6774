"""The policies to compare with: each by its own rule, over the same state, with the same terms to explain it."""

from collections import Counter
from typing import get_args

import pytest

from baton.cluster.worker_info import Load
from baton.settings import Policy
from tests.router.placement_rig import BUSY, Rig, a_fleet, a_request, a_worker, pair_of

POLICIES: tuple[Policy, ...] = get_args(Policy)
OTHERS = [policy for policy in POLICIES if policy != "least-added-latency"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_says_what_its_choice_costs(policy: Policy) -> None:
    rig = Rig(a_fleet(3, 3), policy)
    for number in range(20):
        _, decision = rig.place(a_request(1000, number))
        assert decision.policy == policy
        assert decision.chosen.terms.prefill_s > 0
        assert decision.chosen.terms.decode_s > 0
        candidates = [decision.chosen, *decision.others]
        named = {(one.prefill and one.prefill.worker_id, one.decode.worker_id) for one in candidates}
        assert len(named) == len(candidates) == 8
        assert decision.considered == 3 * 3 + 3


@pytest.mark.parametrize("policy", OTHERS)
def test_the_other_policies_prefill_on_a_decode_worker_only_without_prefill_workers(policy: Policy) -> None:
    assert pair_of(Rig(a_fleet(1, 1), policy).serve(a_request(10))) == ("p0", "d0")
    assert pair_of(Rig(a_fleet(0, 1), policy).serve(a_request(10))) == (None, "d0")


def test_round_robin_takes_turns_and_a_newcomer_gets_one_turn_at_a_time() -> None:
    rig = Rig(a_fleet(2, 3), "round-robin")
    turns = [pair_of(rig.serve(a_request(10, number)))[1] for number in range(9)]
    assert turns[:3] == turns[3:6] == turns[6:]
    assert set(turns) == {"d0", "d1", "d2"}
    rig.placer.set_workers([*a_fleet(2, 3), a_worker("d3")])
    turns = [pair_of(rig.serve(a_request(10, number)))[1] for number in range(8)]
    assert Counter(turns) == {"d0": 2, "d1": 2, "d2": 2, "d3": 2}


def test_random_is_even_in_the_long_run() -> None:
    rig = Rig(a_fleet(2, 2), "random")
    pairs = Counter(pair_of(rig.serve(a_request(10, number))) for number in range(400))
    assert len(pairs) == 4
    assert min(pairs.values()) > 60


def test_least_loaded_looks_at_waiting_prompts_and_at_kv() -> None:
    busy = a_worker("d1", load=BUSY)
    rig = Rig(
        [
            a_worker("p0", "prefill", load=Load(waiting_tokens=3000)),
            a_worker("p1", "prefill", load=Load(waiting_tokens=2000)),
            a_worker("d0"),
            busy,
        ],
        "least-loaded",
    )
    assert pair_of(rig.place(a_request(5000))[1]) == ("p1", "d0")
    assert pair_of(rig.place(a_request(5000, "another"))[1]) == ("p0", "d0")


def test_prefix_affinity_follows_the_prefix_unless_it_is_short_or_load_is_uneven() -> None:
    rig = Rig(a_fleet(3, 1), "prefix-affinity")
    prompt = a_request(1600)
    rig.hold("p1", prompt, blocks=60)
    rig.hold("p2", prompt, blocks=59)
    assert pair_of(rig.placer.place(prompt))[0] == "p1"
    fresh = Rig(a_fleet(3, 1), "prefix-affinity")
    fresh.hold("p1", prompt, blocks=29)
    chosen = {pair_of(fresh.placer.place(prompt))[0] for _ in range(40)}
    assert chosen == {"p0", "p1", "p2"}, "under 30 % is no reason"
    for _ in range(65):
        rig.place(prompt)
    assert pair_of(rig.placer.place(prompt))[0] != "p1", "65 more requests than the others have"


def test_block_cost_adds_active_blocks_and_takes_off_what_is_cached() -> None:
    rig = Rig(
        [
            a_worker("p0", "prefill", load=Load(waiting_tokens=1600)),
            a_worker("p1", "prefill"),
            a_worker("d0", load=Load(running_sequences=1, kv_blocks_used=50)),
            a_worker("d1", load=Load(running_sequences=9, kv_blocks_used=40)),
        ],
        "block-cost",
    )
    prompt = a_request(3200)
    assert pair_of(rig.placer.place(prompt)) == ("p1", "d1")
    rig.hold("p0", prompt, blocks=99)
    rig.hold("d0", prompt, blocks=150)
    assert pair_of(rig.placer.place(prompt)) == ("p1", "d1"), "100 waiting and 99 cached: 1 more; none for decode"
    rig.hold("p0", prompt, blocks=101)
    assert pair_of(rig.placer.place(prompt)) == ("p0", "d1")
