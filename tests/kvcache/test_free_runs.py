from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockId
from kvcache.free_runs import FreeRuns


def runs(free: FreeRuns) -> list[tuple[int, int]]:
    return list(free)


def taken(free: FreeRuns, count: int, after: int | None = None) -> list[int]:
    return [int(block) for block in free.take(count, None if after is None else BlockId(after))]


def test_a_new_sequence_lies_together_with_room_on_both_sides() -> None:
    free = FreeRuns(100)
    assert taken(free, 10) == list(range(45, 55))
    assert runs(free) == [(0, 45), (55, 100)]


def test_growth_continues_where_the_sequence_ends() -> None:
    free = FreeRuns(10)
    first = taken(free, 2)
    assert taken(free, 3, after=first[-1]) == [first[-1] + 1, first[-1] + 2, first[-1] + 3]


def test_growth_past_a_neighbour_goes_on_elsewhere() -> None:
    free = FreeRuns(4)
    for block in taken(free, 4):
        if block != 1:
            free.add(BlockId(block))
    assert taken(free, 3, after=0) == [2, 3, 0]


def test_neighbours_join_again() -> None:
    free = FreeRuns(6)
    for block in sorted(taken(free, 6), key=lambda block: block * 5 % 6):
        free.add(BlockId(block))
    assert runs(free) == [(0, 6)]


def test_more_than_there_is_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        FreeRuns(3).take(4, None)


@given(st.data(), st.integers(1, 40))
def test_is_a_set_of_ids(data: st.DataObject, blocks: int) -> None:
    free, expected = FreeRuns(blocks), set(range(blocks))
    for _ in range(data.draw(st.integers(1, 30))):
        outside = sorted(set(range(blocks)) - expected)
        if outside and data.draw(st.booleans()):
            block = data.draw(st.sampled_from(outside))
            free.add(BlockId(block))
            expected.add(block)
        else:
            after = data.draw(st.sampled_from([None, *outside]))
            got = taken(free, data.draw(st.integers(0, len(expected))), after)
            assert len(set(got)) == len(got)
            assert set(got) <= expected
            if got and after is not None and after + 1 in expected:
                assert got[0] == after + 1
            expected -= set(got)
        assert len(free) == len(expected)
        assert {block for start, end in free for block in range(start, end)} == expected
        assert all(end < start for (_, end), (start, _) in pairwise(free))
