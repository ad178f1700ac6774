"""Sampling: the filters against their definitions, and that nothing but seed, position and logits matters."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.sampling import SamplingParams
from engine.batch import Draw
from engine.sampler import sample, uniform

VOCABULARY = 8


def draw(
    seed: int = 0,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    forbidden: frozenset[int] = frozenset(),
    **params: Any,
) -> Draw:
    return Draw(SamplingParams(**params), seed, prompt, output, forbidden)


def one(logits: list[float], **options: Any) -> int:
    return sample(torch.tensor([logits]), [draw(**options)])[0].token_id


def drawn_over_seeds(logits: list[float], count: int = 400, **options: Any) -> Counter[int]:
    """All in one batch, one seed a row."""
    rows = torch.tensor([logits]).repeat(count, 1)
    return Counter(drawn.token_id for drawn in sample(rows, [draw(seed=seed, **options) for seed in range(count)]))


def with_probabilities(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -math.inf for p in probabilities]


# ---- greedy


def test_greedy_takes_the_best_and_the_lowest_of_equals() -> None:
    assert one([0.0, 3.0, 1.0, 3.0], temperature=0) == 1


def test_greedy_heeds_bias_and_forbidden_tokens() -> None:
    assert one([0.0, 3.0, 1.0], temperature=0, logit_bias={2: 5.0}) == 2
    assert one([0.0, 3.0, 1.0], temperature=0, forbidden=frozenset({1})) == 2
    assert one([0.0, 3.0, 1.0], temperature=0, forbidden=frozenset({1}), logit_bias={1: 100.0}) == 2


def test_repetition_penalty_counts_prompt_and_output_whatever_the_sign() -> None:
    assert one([2.0, 1.5, -9.0], temperature=0, prompt=(0,), repetition_penalty=2.0) == 1
    assert one([2.0, 1.5, -9.0], temperature=0, prompt=(2,), output=(0,), repetition_penalty=2.0) == 1
    assert one([-1.0, -1.5], temperature=0, prompt=(0,), repetition_penalty=2.0) == 1
    assert one([-1.0, -1.5], temperature=0, prompt=(0, 0, 0), repetition_penalty=1.4) == 0


def test_presence_and_frequency_count_the_output_alone() -> None:
    assert one([2.0, 1.5], temperature=0, prompt=(0,), presence_penalty=1.0, frequency_penalty=1.0) == 0
    assert one([2.0, 1.5], temperature=0, output=(0,), presence_penalty=1.0) == 1
    assert one([2.0, 1.0], temperature=0, output=(0,), frequency_penalty=0.6) == 0
    assert one([2.0, 1.0], temperature=0, output=(0, 0), frequency_penalty=0.6) == 1
    assert one([2.0, 1.0], temperature=0, output=(1, 1), presence_penalty=-0.5, frequency_penalty=-0.5) == 1


def test_the_callers_logits_are_left_as_they_were() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    before = logits.clone()
    sample(logits, [draw(logit_bias={1: 3.0}, forbidden=frozenset({0}), repetition_penalty=1.5, top_k=1)])
    assert torch.equal(logits, before)


# ---- the draw


def test_the_distribution_is_the_softmax_at_the_temperature() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        counts = drawn_over_seeds(logits, count=4000, temperature=temperature)
        expected = torch.softmax(torch.tensor(logits) / temperature, -1).tolist()
        for token, probability in enumerate(expected):
            assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_positions_draw_independently() -> None:
    tokens = [one([0.0] * VOCABULARY, output=(1,) * position) for position in range(60)]
    assert len(set(tokens)) == VOCABULARY


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_is_a_fraction_and_repeats(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_uniform_never_changes() -> None:
    """Workers of two versions must draw alike: these numbers are part of the protocol."""
    assert uniform(0, 0) == pytest.approx(0.0564663990004608, abs=1e-15)
    assert uniform(2**64 - 1, 7) == pytest.approx(0.9622429077364112, abs=1e-15)


@given(st.data())
def test_a_row_draws_alike_whatever_its_batch(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(6, 50, generator=generator) * 3
    draws = [
        draw(
            seed=data.draw(st.integers(0, 2**64 - 1)),
            output=(3,) * data.draw(st.integers(0, 3)),
            temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
            top_k=data.draw(st.sampled_from([0, 1, 5, 50])),
            top_p=data.draw(st.sampled_from([0.1, 0.7, 1.0])),
            min_p=data.draw(st.sampled_from([0.0, 0.2])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            logprobs=data.draw(st.sampled_from([None, 2])),
        )
        for _ in range(6)
    ]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(6)]
    assert [drawn.token_id for drawn in together] == [drawn.token_id for drawn in alone]


def test_tiny_differences_change_almost_no_draw() -> None:
    """Vocabulary order: two nearly equal logits that swap ranks must not swap what is drawn."""
    logits = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)) * 0.01
    draws = [draw(seed=seed) for seed in range(200)]
    noisy = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * 1e-6
    assert [d.token_id for d in sample(logits, draws)] == [d.token_id for d in sample(noisy, draws)]


# ---- filters


def kept(probabilities: list[float], **params: Any) -> set[int]:
    return set(drawn_over_seeds(with_probabilities(*probabilities), count=600, **params))


def test_top_k() -> None:
    probabilities = [0.1, 0.4, 0.2, 0.3]
    assert kept(probabilities, top_k=1) == {1}
    assert kept(probabilities, top_k=3) == {1, 2, 3}
    assert kept(probabilities, top_k=100) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = [0.1, 0.4, 0.2, 0.3]
    assert kept(probabilities, top_p=0.39) == {1}
    assert kept(probabilities, top_p=0.41) == {1, 3}
    assert kept(probabilities, top_p=0.85) == {1, 2, 3}
    assert kept(probabilities, top_p=1.0) == {0, 1, 2, 3}
    assert kept(probabilities, top_p=1e-9) == {1}


def test_top_p_beyond_the_candidates_sorts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sampler.CANDIDATES", 2)
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.85) == {1, 2, 3}


def test_min_p_is_relative_to_the_best() -> None:
    assert kept([0.05, 0.5, 0.15, 0.3], min_p=0.2) == {1, 2, 3}
    assert kept([0.05, 0.5, 0.15, 0.3], min_p=1.0) == {1}


def test_filters_follow_one_another() -> None:
    """Top-p is of what top-k left: 0.4 of 0.7 is 0.57."""
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2, top_p=0.55) == {1}
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2, top_p=0.6) == {1, 3}


def test_filters_of_one_row_are_not_anothers() -> None:
    logits = torch.tensor(with_probabilities(0.1, 0.4, 0.2, 0.3)).repeat(300, 1)
    draws = [draw(seed=seed, **({"top_k": 1}, {"top_p": 0.5}, {})[seed % 3]) for seed in range(300)]
    tokens = [drawn.token_id for drawn in sample(logits, draws)]
    assert set(tokens[0::3]) == {1} and set(tokens[1::3]) == {1, 3} and set(tokens[2::3]) == {0, 1, 2, 3}


def test_forbidden_and_impossible_tokens_are_never_drawn() -> None:
    assert set(drawn_over_seeds([5.0, 0.0, 0.0, -math.inf], forbidden=frozenset({0}))) == {1, 2}


# ---- logprobs


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = [1.0, 3.0, 2.0, 0.0]
    expected = torch.log_softmax(torch.tensor(logits), -1).tolist()
    options = {"temperature": 0.1, "logit_bias": {0: 50.0}, "top_k": 1, "forbidden": frozenset({1})}
    [drawn] = sample(torch.tensor([logits]), [draw(logprobs=2, **options)])  # type: ignore[arg-type]
    assert [entry.token_id for entry in drawn.logprobs] == [0, 1, 2]
    assert [entry.logprob for entry in drawn.logprobs] == pytest.approx([expected[0], expected[1], expected[2]])


def test_each_row_gets_the_logprobs_that_it_asked_for() -> None:
    logits = torch.randn(4, VOCABULARY)
    drawn = sample(logits, [draw(logprobs=None), draw(logprobs=0), draw(logprobs=3), draw(logprobs=20)])
    assert [len(one.logprobs) for one in drawn] == [0, 1, 4, 1 + VOCABULARY]
    assert all(one.logprobs[0].token_id == one.token_id for one in drawn[1:])
