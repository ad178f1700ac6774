"""Which blocks are here and right."""

import pytest

from baton.errors import Unavailable
from decode_worker.landing import Landing


def test_all_blocks_told_and_right() -> None:
    landing = Landing(3)
    assert landing.landed(0, [7, 8]) == range(2)
    assert not landing.was_told_all
    assert landing.landed(2, [9]) == range(2, 3)
    assert landing.was_told_all
    assert landing.verified(range(2, 3), []) == []
    assert not landing.is_right
    assert landing.verified(range(2), []) == []
    assert landing.is_right
    assert landing.digests == [7, 8, 9]


def test_a_wrong_block_is_asked_for_once_more() -> None:
    landing = Landing(3)
    told = landing.landed(0, [7, 8, 9])
    assert landing.verified(told, [1]) == [1]
    assert landing.was_told_all
    assert not landing.is_right
    landing.verified(landing.landed(1, [8]), [])
    assert landing.is_right


def test_a_block_that_stays_wrong_ends_it() -> None:
    landing = Landing(1)
    landing.verified(landing.landed(0, [7]), [0])
    with pytest.raises(Unavailable, match="again"):
        landing.verified(landing.landed(0, [7]), [0])


@pytest.mark.parametrize(("first", "digests"), [(0, [1]), (1, [1, 2]), (2, [1]), (4294967295, [1])])
def test_what_was_told_or_never_asked_for_is_refused(first: int, digests: list[int]) -> None:
    landing = Landing(2)
    landing.landed(0, [1])
    with pytest.raises(Unavailable, match="not asked for"):
        landing.landed(first, digests)


def test_nothing_is_missing_of_nothing() -> None:
    landing = Landing(0)
    assert landing.is_right
    assert landing.was_told_all
