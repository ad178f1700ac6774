import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.latency import DEFAULT_LATENCY, DecodeCost, PrefillCost, Tier, TransferCost, WorkerLatency
from kvcache.restore_plan import (
    DEFAULT_RESTORE,
    GRACE_S,
    RestoreCosts,
    RestorePlan,
    keeps_ahead,
    overdue_s,
    plan_restore,
    runs_of,
    should_give_up,
)

BLOCK_BYTES = 1000
TIER = st.sampled_from(("hbm", "ddr", "ssd"))


def costs(token_s: float = 0.001, **restore: TransferCost) -> RestoreCosts:
    latency = WorkerLatency(PrefillCost(0.0, token_s, 0.0), DecodeCost(0, 0, 0), DEFAULT_LATENCY.transfer, restore)  # type: ignore[arg-type]
    return RestoreCosts(latency, block_tokens=16, block_bytes=BLOCK_BYTES, chunk_tokens=64)


def per_block(seconds: float, latency_s: float = 0.0) -> TransferCost:
    return TransferCost(latency_s, BLOCK_BYTES / seconds)


def test_what_lies_in_hbm_is_always_reused() -> None:
    assert plan_restore([("hbm", 5)], 100, costs()) == RestorePlan(5, 0.0)
    assert plan_restore([], 100, costs()) == RestorePlan(0, 0.0)


def test_a_tier_is_used_where_it_is_quicker_than_computing() -> None:
    quick, slow = per_block(0.010), per_block(0.020)  # computing a block takes 0.016
    assert plan_restore([("hbm", 2), ("ddr", 3)], 100, costs(ddr=quick)) == RestorePlan(5, pytest.approx(0.030))
    assert plan_restore([("hbm", 2), ("ddr", 3)], 100, costs(ddr=slow)) == RestorePlan(2, 0.0)


def test_a_slow_tier_is_worth_it_for_what_lies_behind() -> None:
    """Each tier's latency is counted once."""
    both = costs(ddr=per_block(0.001), ssd=per_block(0.017, latency_s=0.01))
    assert plan_restore([("ddr", 1), ("ssd", 1), ("ddr", 5)], 200, both).blocks == 7
    assert plan_restore([("ddr", 1), ("ssd", 1)], 200, both).blocks == 1


def test_a_latency_is_not_worth_it_for_a_few_blocks() -> None:
    only = costs(ssd=per_block(0.001, latency_s=0.1))
    assert plan_restore([("ssd", 5)], 200, only).blocks == 0
    assert plan_restore([("ssd", 10)], 200, only).blocks == 10


def test_a_tier_of_unknown_speed_ends_the_run() -> None:
    assert plan_restore([("hbm", 1), ("ssd", 1), ("hbm", 5)], 200, costs()).blocks == 1


def test_behind_what_others_restore_it_may_be_quicker_to_compute() -> None:
    quick = costs(ddr=per_block(0.010))  # computing a block takes 0.016
    assert plan_restore([("ddr", 5)], 100, quick, 0.029) == RestorePlan(5, pytest.approx(0.079))
    assert plan_restore([("ddr", 5)], 100, quick, 0.031).blocks == 0
    assert plan_restore([("hbm", 5)], 100, quick, 1.0) == RestorePlan(5, 0.0), "nothing has to come up"


def test_runs() -> None:
    assert runs_of(["hbm", "hbm", "ddr", "hbm"]) == [("hbm", 2), ("ddr", 1), ("hbm", 1)]
    assert runs_of([]) == []


@given(
    places=st.lists(TIER, max_size=12),
    token_s=st.sampled_from([1e-5, 1e-4, 1e-3]),
    context_s=st.sampled_from([0.0, 1e-7, 1e-6]),
    ddr_s=st.floats(1e-5, 0.1),
    ssd_s=st.floats(1e-5, 0.1),
    latency_s=st.sampled_from([0.0, 0.005]),
)
def test_no_other_cut_is_quicker(
    places: list[Tier], token_s: float, context_s: float, ddr_s: float, ssd_s: float, latency_s: float
) -> None:
    restore: dict[Tier, TransferCost] = {"ddr": per_block(ddr_s, latency_s), "ssd": per_block(ssd_s, latency_s)}
    latency = WorkerLatency(
        PrefillCost(0.0, token_s, context_s), DecodeCost(0, 0, 0), DEFAULT_LATENCY.transfer, restore
    )
    its = RestoreCosts(latency, 16, BLOCK_BYTES, 64)
    tokens = 16 * 12 + 1

    def total_s(blocks: int) -> float:
        below: dict[Tier, int] = {tier: places[:blocks].count(tier) for tier in ("ddr", "ssd")}
        return its.restore_s(below) + its.compute_s(tokens, 16 * blocks)

    plan = plan_restore(runs_of(places), tokens, its)
    assert total_s(plan.blocks) <= min(map(total_s, range(len(places) + 1))) + 1e-9


def test_there_is_a_default_for_every_lower_tier() -> None:
    assert set(DEFAULT_RESTORE) == {"ddr", "ssd"}


# ---- when to begin, and when to give up


@given(
    landed=st.integers(0, 8),
    layers=st.integers(1, 8),
    left_s=st.floats(0, 1),
    step_s=st.floats(0.001, 1),
)
def test_who_keeps_ahead_waits_for_no_layer(landed: int, layers: int, left_s: float, step_s: float) -> None:
    landed = min(landed, layers)
    waits = any(
        (layer + 1 - landed) * left_s / (layers - landed) > layer * step_s / layers + 1e-12
        for layer in range(landed, layers)
    )
    if keeps_ahead(landed, layers, left_s, step_s):
        assert not waits
    elif landed:
        assert any(
            (layer + 1 - landed) * left_s / (layers - landed) > layer * step_s / layers - 1e-12
            for layer in range(landed, layers)
        )


def test_nobody_begins_before_the_first_layer() -> None:
    assert not keeps_ahead(0, 4, 0.001, 10.0)
    assert keeps_ahead(4, 4, 1.0, 0.001), "it only has to be verified"


def test_what_is_on_time_is_not_given_up() -> None:
    assert not should_give_up(waited_s=0.05, left_s=9.0, expected_s=0.1, compute_s=0.01)


def test_what_is_late_is_given_up_for_computing_when_that_is_quicker() -> None:
    late_s = 0.1 + 2 * GRACE_S
    assert should_give_up(late_s, left_s=0.3, expected_s=0.1, compute_s=0.2)
    assert not should_give_up(late_s, left_s=0.1, expected_s=0.1, compute_s=0.2)


def test_what_is_overdue_is_given_up_whatever_it_says() -> None:
    assert should_give_up(overdue_s(0.1, 0.2) + 0.001, left_s=0.0, expected_s=0.1, compute_s=0.2)
