"""Workers with known coefficients, noisy clocks and bad days: what the fit makes of them."""

from collections.abc import Callable
from dataclasses import astuple, replace
from math import exp
from random import Random
from statistics import mean

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton.latency import DEFAULT_LATENCY, DecodeCost, PrefillCost, StepWork, Tier, TransferCost, WorkerLatency
from baton.latency_fit import LatencyFit, LinearFit

SEEDS = range(6)
NOISE = 0.05
"""Standard deviation of the logarithm of what is measured."""
WORKER = WorkerLatency(
    PrefillCost(chunk_s=0.004, token_s=5e-5, token_context_s=2e-8),
    DecodeCost(step_s=0.006, sequence_s=3e-4, kv_token_s=2e-7),
    TransferCost(latency_s=5e-4, bytes_per_s=5e9),
)

Draw = Callable[[Random], StepWork]


def slower(latency: WorkerLatency, factor: float) -> WorkerLatency:
    prefill, decode = latency.prefill, latency.decode
    return replace(
        latency,
        prefill=PrefillCost(factor * prefill.chunk_s, factor * prefill.token_s, factor * prefill.token_context_s),
        decode=DecodeCost(factor * decode.step_s, factor * decode.sequence_s, factor * decode.kv_token_s),
    )


def decoding(random: Random) -> StepWork:
    sequences = random.randint(1, 64)
    return StepWork(sequences, sequences * random.randint(50, 4000))


def prefilling(random: Random) -> StepWork:
    new, before = random.randint(16, 512), random.choice([0, 512, 1024, 4096])
    return StepWork(new_tokens=new, token_context=new * (before + new / 2))


def mixed(random: Random) -> StepWork:
    return replace(prefilling(random), sequences=(batch := random.randint(1, 8)), kv_tokens=batch * 500)


def anything(random: Random) -> StepWork:
    return random.choice([decoding, prefilling])(random)


def serve(
    fit: LatencyFit, worker: WorkerLatency, draw: Draw, steps: int, random: Random, noise: float = NOISE
) -> LatencyFit:
    for _ in range(steps):
        work = draw(random)
        fit.observe_step(work, worker.step_time_s(work) * exp(random.gauss(0, noise)))
    return fit


def errors(latency: WorkerLatency, worker: WorkerLatency, draw: Draw) -> list[float]:
    """Of predictions for a hundred steps, relative."""
    works = [draw(Random(seed)) for seed in range(1000, 1100)]
    return [abs(latency.step_time_s(work) / worker.step_time_s(work) - 1) for work in works]


def worst_error(latency: WorkerLatency, worker: WorkerLatency, draw: Draw) -> float:
    return max(errors(latency, worker, draw))


def usual_error(latency: WorkerLatency, worker: WorkerLatency, draw: Draw) -> float:
    return mean(errors(latency, worker, draw))


def coefficients(latency: WorkerLatency) -> list[float]:
    prefill, decode, transfer = latency.prefill, latency.decode, latency.transfer
    return [
        *(prefill.chunk_s, prefill.token_s, prefill.token_context_s),
        *(decode.step_s, decode.sequence_s, decode.kv_token_s),
        *(transfer.latency_s, transfer.bytes_per_s),
    ]


# ---- what it learns


def test_it_knows_nothing_at_first_but_what_it_was_given() -> None:
    assert coefficients(LatencyFit().latency) == pytest.approx(coefficients(DEFAULT_LATENCY))
    assert coefficients(LatencyFit(WORKER).latency) == pytest.approx(coefficients(WORKER))


def test_without_noise_it_finds_the_coefficients_whatever_their_magnitudes() -> None:
    fit = serve(LatencyFit(), WORKER, anything, 400, Random(1), noise=0)
    random = Random(2)
    for _ in range(300):
        size_bytes = random.choice([10**4, 10**6, 10**8])
        fit.observe_transfer(size_bytes, WORKER.transfer.time_s(size_bytes))
    assert coefficients(fit.latency) == pytest.approx(coefficients(WORKER), rel=0.02)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draw", [decoding, prefilling, anything])
def test_it_predicts_within_a_few_per_cent_what_it_has_seen_the_like_of(draw: Draw, seed: int) -> None:
    fit = serve(LatencyFit(), WORKER, draw, 200, Random(seed))
    assert worst_error(fit.latency, WORKER, draw) < 0.08


@settings(max_examples=30, deadline=None)
@given(
    factors=st.tuples(*[st.floats(0.2, 3)] * 6),
    seed=st.integers(0, 1000),
)
def test_it_finds_any_worker_that_is_not_too_far_from_what_it_was_given(factors: tuple[float, ...], seed: int) -> None:
    prefill, decode = DEFAULT_LATENCY.prefill, DEFAULT_LATENCY.decode
    a, b, c, d, e, f = factors
    worker = replace(
        DEFAULT_LATENCY,
        prefill=PrefillCost(a * prefill.chunk_s, b * prefill.token_s, c * prefill.token_context_s),
        decode=DecodeCost(d * decode.step_s, e * decode.sequence_s, f * decode.kv_token_s),
    )
    fit = serve(LatencyFit(), worker, anything, 200, Random(seed), noise=0.03)
    assert usual_error(fit.latency, worker, anything) < 0.05
    assert worst_error(fit.latency, worker, anything) < 0.4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.builds(StepWork, st.integers(1, 512), st.integers(1, 10**6), st.integers(0, 4096), st.just(10**7)),
            st.just(0.0) | st.floats(1e-9, 1000),
        ),
        max_size=60,
    ),
    st.lists(st.tuples(st.integers(1, 10**10), st.just(0.0) | st.floats(1e-9, 1000)), max_size=30),
)
def test_whatever_is_measured_no_coefficient_is_negative_and_every_prediction_positive(
    steps: list[tuple[StepWork, float]], transfers: list[tuple[int, float]]
) -> None:
    fit = LatencyFit()
    for work, seconds in steps:
        fit.observe_step(work, seconds)
    for size_bytes, seconds in transfers:
        fit.observe_transfer(size_bytes, seconds)
    assert all(0 <= value < float("inf") for value in coefficients(fit.latency))
    assert fit.latency.transfer.bytes_per_s > 0
    for work, _ in steps:
        assert fit.latency.step_time_s(work) > 0


def test_what_the_clock_is_too_coarse_to_see_says_nothing() -> None:
    fit = LatencyFit(WORKER)
    fit.observe_step(StepWork(1, 10), 0.0)
    fit.observe_transfer(1000, 0.0)
    assert coefficients(fit.latency) == coefficients(LatencyFit(WORKER).latency)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("factor", [0.1, 30.0, 100.0])
def test_it_finds_a_worker_that_is_nothing_like_what_it_was_given(factor: float, seed: int) -> None:
    """What it took in before it noticed must not count for more than what it sees since."""
    worker = slower(WORKER, factor)
    fit = serve(LatencyFit(), worker, anything, 200, Random(seed))
    assert usual_error(fit.latency, worker, anything) < 0.05


# ---- what does not wreck it


@pytest.mark.parametrize("seed", SEEDS)
def test_pauses_do_not_count(seed: int) -> None:
    """One step in thirty takes two seconds longer: some hundred times too long."""
    random, fit = Random(seed), LatencyFit()
    for _ in range(300):
        work = anything(random)
        pause_s = 2.0 if random.random() < 1 / 30 else 0.0
        fit.observe_step(work, WORKER.step_time_s(work) * exp(random.gauss(0, NOISE)) + pause_s)
    assert usual_error(fit.latency, WORKER, anything) < 0.1
    assert worst_error(fit.latency, WORKER, anything) < 0.3


@pytest.mark.parametrize("seconds", [1e-9, 10.0])
def test_one_absurd_measurement_moves_it_by_a_few_per_cent(seconds: float) -> None:
    fit = serve(LatencyFit(), WORKER, decoding, 100, Random(1))
    before = fit.latency
    fit.observe_step(StepWork(32, 32_000), seconds)
    assert worst_error(fit.latency, before, decoding) < 0.05


def test_a_batch_that_never_changes_keeps_the_split_of_its_cost_and_follows_the_whole() -> None:
    work = StepWork(32, 32_000)
    fit = serve(LatencyFit(WORKER), slower(WORKER, 2), lambda _: work, 300, Random(1), noise=0)
    learned, expected = fit.latency.decode, slower(WORKER, 2).decode
    assert fit.latency.step_time_s(work) == pytest.approx(slower(WORKER, 2).step_time_s(work), rel=0.01)
    shares = [learned.step_s / expected.step_s, learned.sequence_s / expected.sequence_s]
    assert shares == pytest.approx([1, 1], rel=0.05)


def test_chunks_that_are_always_full_keep_the_split_of_their_cost() -> None:
    """Then what a chunk costs and what its tokens cost cannot be told apart."""

    def full(random: Random) -> StepWork:
        return StepWork(new_tokens=512, token_context=512 * (random.choice([0, 512, 1024, 2048]) + 256.0))

    fit = serve(LatencyFit(WORKER), slower(WORKER, 2), full, 300, Random(3))
    expected = slower(WORKER, 2).prefill
    assert worst_error(fit.latency, slower(WORKER, 2), full) < 0.05
    assert fit.latency.prefill.chunk_s == pytest.approx(expected.chunk_s, rel=0.15)
    assert fit.latency.prefill.token_s == pytest.approx(expected.token_s, rel=0.15)


@pytest.mark.parametrize("seed", SEEDS)
def test_transfers_of_one_size_are_predicted_whatever_the_split(seed: int) -> None:
    random, fit, link = Random(seed), LatencyFit(), TransferCost(2e-3, 2e9)
    for _ in range(200):
        fit.observe_transfer(10**7, link.time_s(10**7) * exp(random.gauss(0, NOISE)))
    assert fit.latency.transfer.time_s(10**7) == pytest.approx(link.time_s(10**7), rel=0.04)
    assert fit.latency.transfer.latency_s > 0 and fit.latency.transfer.bytes_per_s > 10**8


@pytest.mark.parametrize("seed", SEEDS)
def test_transfers_of_many_sizes_tell_latency_from_bandwidth(seed: int) -> None:
    random, fit, link = Random(seed), LatencyFit(), TransferCost(3e-4, 1e10)
    for _ in range(200):
        size_bytes = round(10 ** random.uniform(4, 9))
        fit.observe_transfer(size_bytes, link.time_s(size_bytes) * exp(random.gauss(0, NOISE)))
    assert fit.latency.transfer.latency_s == pytest.approx(link.latency_s, rel=0.1)
    assert fit.latency.transfer.bytes_per_s == pytest.approx(link.bytes_per_s, rel=0.1)


# ---- what changes


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("factor", [1 / 3, 1.5, 3.0, 10.0])
def test_it_follows_a_worker_whose_speed_changes_within_some_tens_of_steps(factor: float, seed: int) -> None:
    random = Random(seed)
    fit = serve(LatencyFit(), WORKER, anything, 200, random)
    assert worst_error(fit.latency, WORKER, anything) < 0.1
    serve(fit, slower(WORKER, factor), anything, 40, random)
    assert worst_error(fit.latency, slower(WORKER, factor), anything) < 0.2


def test_a_pause_is_no_change_and_four_slow_steps_are_one() -> None:
    fit = LinearFit([1.0])
    for _ in range(100):
        fit.observe((1.0,), 1.0)
    for _ in range(3):
        fit.observe((1.0,), 3.0)
    assert fit.predict_s((1.0,)) < 1.2
    fit.observe((1.0,), 3.0)
    assert fit.predict_s((1.0,)) == pytest.approx(3, rel=0.1)


def test_slow_and_fast_steps_in_turns_are_noise() -> None:
    fit = LinearFit([1.0])
    for _ in range(100):
        fit.observe((1.0,), 1.0)
    for _ in range(2):
        for seconds in (3.0, 3.0, 3.0, 1.0 / 3):
            fit.observe((1.0,), seconds)
    assert fit.predict_s((1.0,)) == pytest.approx(1, rel=0.3)


# ---- steps of both kinds


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_of_both_kinds_tell_of_their_chunks(seed: int) -> None:
    """Such as on a decode worker that prefills short prompts itself, beside its batch."""

    def draw(random: Random) -> StepWork:
        return random.choice([decoding, mixed])(random)

    fit = serve(LatencyFit(), WORKER, draw, 400, Random(seed))
    for kind in (decoding, mixed, prefilling):
        assert worst_error(fit.latency, WORKER, kind) < 0.12


def test_a_step_that_mostly_decodes_says_nothing() -> None:
    """What its few new tokens took would be the difference of two large numbers."""
    fit = LatencyFit(WORKER)
    work = StepWork(64, 200_000, 2, 2.0)
    fit.observe_step(work, fit.latency.added_decode_s(work) * 1.1)
    assert coefficients(fit.latency) == coefficients(LatencyFit(WORKER).latency)


def test_chunks_that_were_timed_together_teach_the_same_as_one_by_one() -> None:
    """A prompt of three full chunks and a last one, of any length."""

    def prompt(random: Random) -> StepWork:
        new = 3 * 512 + random.randint(16, 512)
        return StepWork(new_tokens=new, token_context=new * new / 2, steps=4)

    def draw(random: Random) -> StepWork:
        return random.choice([prompt, prefilling])(random)

    exact = serve(LatencyFit(WORKER), WORKER, draw, 100, Random(5), noise=0)
    assert coefficients(exact.latency) == pytest.approx(coefficients(WORKER), rel=1e-6)
    fit = serve(LatencyFit(), WORKER, draw, 300, Random(5))
    assert worst_error(fit.latency, WORKER, draw) < 0.08
    assert worst_error(fit.latency, WORKER, prefilling) < 0.1


def test_small_transfers_after_large_ones_do_not_spoil_what_is_known_of_the_bandwidth() -> None:
    link, fit, randomness = TransferCost(0.002, 1e9), LatencyFit(), Random(5)
    for size in [100_000_000] * 200 + [20_000] * 12:
        fit.observe_transfer(size, link.time_s(size) * randomness.lognormvariate(0, 0.05))
    assert fit.latency.transfer.time_s(100_000_000) == pytest.approx(link.time_s(100_000_000), rel=0.3)
    assert fit.latency.transfer.time_s(20_000) == pytest.approx(link.time_s(20_000), rel=0.3)


# ---- what links' self-tests tell

LINKS = [TransferCost(1e-5, 4e10), TransferCost(3e-5, 8e9), TransferCost(5e-4, 1.2e8), TransferCost(0.02, 5e6)]


def after_links(cost: TransferCost, random: Random, links: int) -> LatencyFit:
    """By a small and a large transfer of each link, as kvtransfer/link/probe.py makes them."""
    fit = LatencyFit()
    for _ in range(links):
        for size_bytes in (128 * 1024, max(2**20, int(cost.bytes_per_s * 0.05))):
            fit.observe_link_test(size_bytes, cost.time_s(size_bytes) * exp(random.gauss(0, NOISE)))
    return fit


@pytest.mark.parametrize("cost", LINKS)
@pytest.mark.parametrize("links", [1, 2, 5])
def test_the_first_links_are_enough_however_far_off_the_assumption_was(cost: TransferCost, links: int) -> None:
    for seed in SEEDS:
        found = after_links(cost, Random(seed), links).latency.transfer
        for size_bytes in (128 * 1024, 10**7, 10**9):
            assert found.time_s(size_bytes) == pytest.approx(cost.time_s(size_bytes), rel=5 * NOISE)


def test_after_a_real_transfer_tests_are_observations_among_others() -> None:
    fit = after_links(LINKS[1], Random(1), 1)
    for _ in range(40):
        fit.observe_transfer(10**7, LINKS[2].time_s(10**7))
    before = fit.latency.transfer.time_s(10**7)
    fit.observe_link_test(10**7, LINKS[1].time_s(10**7))
    assert fit.latency.transfer.time_s(10**7) == pytest.approx(before, rel=0.2)


# ---- restores


def test_only_tiers_that_were_measured_are_known() -> None:
    fit = LatencyFit()
    assert fit.latency.restore == {}
    fit.observe_restore("ddr", 10**7, 0.0)
    fit.observe_restore("ddr", 0, 1.0)
    assert fit.latency.restore == {}
    fit.observe_restore("ssd", 10**7, 0.01)
    assert fit.latency.restore.keys() == {"ssd"}
    assert fit.latency.restore["ssd"].time_s(10**7) == pytest.approx(0.01)
    assert LatencyFit(fit.latency).latency.restore.keys() == {"ssd"}, "what it starts with"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tested", [False, True])
def test_each_tier_is_learned_by_itself(tested: bool, seed: int) -> None:
    random, fit = Random(seed), LatencyFit()
    costs: dict[Tier, TransferCost] = {"ddr": TransferCost(1e-4, 1.2e10), "ssd": TransferCost(8e-4, 3e9)}
    for tier, cost in costs.items():
        for size_bytes in (2**18, 2**23) if tested else ():
            fit.observe_restore_test(tier, size_bytes, cost.time_s(size_bytes))
    for tier, known in fit.latency.restore.items():
        assert astuple(known) == pytest.approx(astuple(costs[tier]))
    for _ in range(200):
        for tier, cost in costs.items():
            size_bytes = round(10 ** random.uniform(5, 9))
            fit.observe_restore(tier, size_bytes, cost.time_s(size_bytes) * exp(random.gauss(0, NOISE)))
    for tier, cost in costs.items():
        for size_bytes in (10**6, 10**7, 10**8):
            assert fit.latency.restore[tier].time_s(size_bytes) == pytest.approx(cost.time_s(size_bytes), rel=0.1)
    assert fit.latency.transfer == LatencyFit().latency.transfer


def test_a_disk_that_becomes_slow_is_noticed() -> None:
    fit = LatencyFit()
    for _ in range(50):
        fit.observe_restore("ssd", 2**24, 0.01)
    for _ in range(20):
        fit.observe_restore("ssd", 2**24, 0.1)
    assert fit.latency.restore["ssd"].time_s(2**24) == pytest.approx(0.1, rel=0.2)


# ---- what tests say


def test_a_test_that_says_nothing_changes_nothing() -> None:
    fit = LatencyFit()
    fit.observe_link_test(1000, 0.0)
    assert fit.latency == LatencyFit().latency


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-7, 10)), min_size=1, max_size=40))
def test_whatever_tests_say_the_model_stays_one(tests: list[tuple[int, float]]) -> None:
    fit = LatencyFit()
    for size_bytes, seconds in tests:
        fit.observe_link_test(size_bytes, seconds)
    transfer = fit.latency.transfer
    assert transfer.latency_s >= 0 and 0 < transfer.bytes_per_s <= 1e14 * 1.01
