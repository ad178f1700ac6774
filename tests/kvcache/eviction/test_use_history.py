from collections import Counter
from hashlib import sha256

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockHash
from kvcache.eviction.history import Seen, UseHistory


def names(*numbers: int) -> list[BlockHash]:
    return [BlockHash(sha256(number.to_bytes(8, "big")).digest()[:16]) for number in numbers]


def see(history: UseHistory, some: list[BlockHash], first: int, now_s: float) -> Seen:
    return history.see(some, first + np.arange(len(some), dtype=np.int32), now_s)


def test_uses_are_counted_and_ages_told() -> None:
    history = UseHistory(64)
    assert see(history, names(1, 2), 0, 10.0).uses.tolist() == [0, 0]
    seen = see(history, names(2, 3), 1, 14.0)
    assert seen.uses.tolist() == [1, 0]
    assert (seen.again.age_s.tolist(), seen.again.uses.tolist(), seen.again.depth.tolist()) == ([4.0], [0], [1])
    assert see(history, names(2), 1, 20.0).again.uses.tolist() == [1]


def test_a_full_set_forgets_what_was_used_longest_ago() -> None:
    history = UseHistory(8)
    assert history.names_max == 8
    see(history, names(*range(8)), 0, 1.0)
    see(history, names(*range(7)), 0, 2.0)
    seen = see(history, names(100), 5, 3.5)
    assert (seen.forgotten.age_s.tolist(), seen.forgotten.depth.tolist()) == ([2.5], [7])
    assert see(history, names(7), 0, 4.0).uses.tolist() == [0]


def test_the_sample_is_of_what_is_there() -> None:
    history = UseHistory(1024)
    see(history, names(*range(300)), 0, 1.0)
    halves = [history.sample(first, history.sets // 2, 3.0) for first in (0, history.sets // 2)]
    assert sorted(depth for half in halves for depth in half.depth.tolist()) == list(range(300))
    assert all((half.age_s == 2.0).all() for half in halves)


@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=60, unique=True), max_size=30))
def test_while_there_is_room_it_counts_exactly(prompts: list[list[int]]) -> None:
    """401 names among 1,024 sets of 8: none is ever forgotten."""
    history, uses = UseHistory(8192), Counter[int]()
    for now_s, numbers in enumerate(prompts):
        seen = see(history, names(*numbers), 0, float(now_s))
        assert seen.uses.tolist() == [uses[number] for number in numbers]
        uses.update(numbers)
        assert len(seen.forgotten.age_s) == 0


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40, unique=True), max_size=20))
def test_it_never_holds_more_than_it_may(prompts: list[list[int]]) -> None:
    history = UseHistory(16)
    entered = 0
    for now_s, numbers in enumerate(prompts):
        seen = see(history, names(*numbers), 0, float(now_s))
        entered += len(numbers) - len(seen.again.age_s) - len(seen.forgotten.age_s)
        assert len(history.sample(0, history.sets, float(now_s)).age_s) == entered <= history.names_max
        assert np.all(seen.uses >= 0)
