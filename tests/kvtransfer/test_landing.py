"""What a receiver makes of what it is told and finds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError
from kvtransfer.fetch.sending import _runs
from kvtransfer.landing import Landing


def begun(blocks: int = 4, asked: int = 6) -> Landing:
    landing = Landing(asked)
    landing.started(blocks)
    return landing


def test_before_the_start_and_of_nothing_all_is_right() -> None:
    assert Landing(3).is_right and Landing(3).digests == ()
    assert begun(0).is_right and begun(0).digests == ()


def test_only_leading_blocks_count() -> None:
    landing = begun()
    assert not landing.is_right
    landing.verified(landing.landed(2, [12, 13]), [])
    assert landing.digests == ()
    landing.verified(landing.landed(0, [10]), [])
    assert landing.digests == (10,) and not landing.is_right
    landing.verified(landing.landed(1, [11]), [])
    assert landing.digests == (10, 11, 12, 13) and landing.is_right


def test_what_does_not_match_is_asked_for_once() -> None:
    landing = begun()
    assert landing.verified(landing.landed(0, [10, 11, 12, 13]), [1, 3]) == [1, 3]
    assert landing.digests == (10,)
    assert landing.verified(landing.landed(1, [21]), []) == []
    assert landing.digests == (10, 21, 12)
    with pytest.raises(TransferError):
        landing.verified(landing.landed(3, [13]), [0])
    assert landing.digests == (10, 21, 12)


@pytest.mark.parametrize(("first", "count"), [(4, 1), (0, 5), (1, 1), (0, 2)])
def test_nobody_waits_for_what_is_there_or_does_not_exist(first: int, count: int) -> None:
    landing = begun()
    landing.landed(1, [1])
    with pytest.raises(TransferError):
        landing.landed(first, [0] * count)


def test_told_is_not_yet_right() -> None:
    landing = begun(3)
    first, last = landing.landed(0, [7, 8]), range(2, 3)
    assert not landing.was_told_all
    assert landing.landed(2, [9]) == last
    assert landing.was_told_all and not landing.is_right
    landing.verified(first, [1])
    landing.verified(last, [])
    assert landing.was_told_all and not landing.is_right, "told, but to come again"
    landing.verified(landing.landed(1, [8]), [])
    assert landing.is_right


def test_before_the_start_nothing_lands() -> None:
    with pytest.raises(TransferError):
        Landing(3).landed(0, [1])


def test_a_sender_starts_once_and_with_no_more_than_was_asked_for() -> None:
    with pytest.raises(TransferError):
        begun(blocks=7)
    with pytest.raises(TransferError):
        begun().started(1)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_runs_are_the_numbers_themselves(numbers: set[int]) -> None:
    runs = list(_runs(sorted(numbers)))
    assert [number for run in runs for number in run] == sorted(numbers)
    assert all(before.stop < after.start for before, after in pairwise(runs))
