import numpy as np
import pytest

from kvcache.eviction.gittins import gittins_index


def test_the_best_while_is_chosen() -> None:
    """Nothing happens in the first second, and a use is certain to come in the next: worth waiting for both."""
    index = gittins_index(np.array([[0.0, 1.0, 0.0]]), np.array([1.0, 1.0, 100.0]))
    assert index[0] == pytest.approx([1 / 1.5, 1 / 0.5, 0.0])


def test_a_falling_chance_is_worth_its_next_bin() -> None:
    chances = np.array([[0.5, 0.1, 0.01]])
    index = gittins_index(chances, np.ones(3))
    assert index == pytest.approx(chances / (1 - chances / 2))


def test_more_likely_kinds_are_worth_more_at_every_age() -> None:
    random = np.random.default_rng(3)
    chances = random.uniform(0.0, 0.5, (1, 20))
    widths_s = 2.0 ** np.arange(20)
    less, more = gittins_index(np.concatenate([chances, chances * 1.5]), widths_s)
    assert (more > less).all()
    assert np.isfinite(more).all()
