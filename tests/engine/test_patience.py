"""Whatever a fetch does, a request is at most so much later than one that computes everything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.worker.patience import FETCH_SHARE, LATE_SHARE, RELEASE_SHARE, Patience

BLOCKS = 10


def rest_share(landed: int) -> float:
    """Later blocks take longer: they attend to more."""
    return 1 - (landed / BLOCKS) ** 2


@given(st.lists(st.floats(0.0, 2.0), max_size=BLOCKS))
def test_giving_up_costs_at_most_half_of_computing(landings_s: list[float]) -> None:
    """`landings_s`: when each block lands, as a share of what computing all takes, which is ten seconds."""
    patience = Patience(10.0, rest_share)
    landings_s = sorted(10.0 * share for share in landings_s)
    landed = 0
    while landed < len(landings_s) and landings_s[landed] < patience.fetch_s(landed):
        landed += 1
    waited_s = patience.fetch_s(landed) + patience.release_s
    assert waited_s + 10.0 * rest_share(landed) <= 10.0 * (1 + LATE_SHARE) + 1e-9
    assert waited_s <= 10.0 + 1e-9


def test_a_fetch_that_keeps_pace_with_computing_is_not_given_up() -> None:
    patience = Patience(10.0, rest_share)
    for landed in range(BLOCKS):
        computed_s = 10.0 * (1 - rest_share(landed))
        assert patience.fetch_s(landed) >= min(computed_s, FETCH_SHARE * 10.0)


def test_what_was_waited_before_counts() -> None:
    assert Patience(10.0, rest_share, waited_s=3.0).fetch_s(0) == pytest.approx(
        10.0 * (LATE_SHARE - RELEASE_SHARE) - 3.0
    )
    assert Patience(10.0, rest_share, waited_s=3.0).left_s == 7.0
    assert Patience(10.0, rest_share, waited_s=5.0).fetch_s(0) < 0
