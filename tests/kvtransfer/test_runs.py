import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT, fill_random, ids, slices

from baton.layout import KVLayout
from kvtransfer.region import HostRegion
from kvtransfer.runs import RUN_BYTES_MAX, Run, copy_run, run_blocks_max, runs_of

blocks = st.lists(st.integers(0, 30), max_size=40)


@given(st.integers(0, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 9), min_size=n, max_size=n)] * 2)))
def test_runs_are_the_same_copies_in_order(pair: tuple[list[int], list[int]]) -> None:
    source, target = pair
    copies = [
        (run.source + i, run.target + i) for run in runs_of(ids(*source), ids(*target), 5) for i in range(run.blocks)
    ]
    assert copies == list(zip(source, target, strict=True))


@given(blocks)
def test_no_two_runs_could_be_one(numbers: list[int]) -> None:
    runs = list(runs_of(ids(*numbers), ids(*numbers), 1000))
    assert all(a.source + a.blocks != b.source for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize(
    ("source", "target", "runs"),
    [
        ((), (), []),
        ((3,), (9,), [Run(3, 9, 1)]),
        ((3, 4, 5), (7, 8, 9), [Run(3, 7, 3)]),
        ((3, 4, 5), (7, 9, 10), [Run(3, 7, 1), Run(4, 9, 2)]),
        ((5, 4), (5, 4), [Run(5, 5, 1), Run(4, 4, 1)]),
        ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), [Run(0, 0, 4), Run(4, 4, 2)]),
    ],
)
def test_adjacent_on_both_sides_is_one_run_up_to_the_bound(
    source: tuple[int, ...], target: tuple[int, ...], runs: list[Run]
) -> None:
    assert list(runs_of(ids(*source), ids(*target), 4)) == runs


def test_a_run_stays_within_its_bytes() -> None:
    assert run_blocks_max(SOURCE_LAYOUT) * SOURCE_LAYOUT.slice_bytes <= RUN_BYTES_MAX
    huge = KVLayout(layers=1, blocks=2, block_tokens=1024, kv_heads=64, head_dim=256, dtype="float32")
    assert run_blocks_max(huge) == 1


def test_a_run_is_copied_and_nothing_else() -> None:
    source, target = HostRegion.allocate(SOURCE_LAYOUT), HostRegion.allocate(TARGET_LAYOUT)
    fill_random(source, seed=3)
    assert copy_run(source, 2, 1, Run(4, 10, 3), target.writable(2, 1, 10, 3)) == 3 * SOURCE_LAYOUT.slice_bytes
    expected = np.zeros_like(slices(target))
    expected[2, 1, 10:13] = slices(source)[2, 1, 4:7]
    assert (slices(target) == expected).all()
    source.close()
    target.close()
