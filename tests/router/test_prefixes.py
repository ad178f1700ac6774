"""Prefixes by column: what the index knows by slot, as a placement reads it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockHash, WorkerId
from router.index.block_table import PrefixLength, column_numbers
from router.index.prefix_index import PrefixIndex
from router.index.prefixes import Prefixes
from router.placement.demand import Demand
from router.placement.fleet import Fleet
from router.placement.worker_load import WorkerLoad
from tests.router.placement_rig import a_worker

SHORT, LONG = PrefixLength(2), PrefixLength(5, 1)


def a_fleet(slots: list[int | None]) -> Fleet:
    loads = [WorkerLoad(a_worker(f"worker-{column}"), 0.0) for column in range(len(slots))]
    fleet = Fleet(loads, Demand(0.0), 0.0)
    for load, slot in zip(fleet.loads, slots, strict=True):
        fleet.set_slot(load, slot)
    return fleet


def by_slot(*sets: tuple[list[int], PrefixLength]) -> list[tuple[np.ndarray, PrefixLength]]:  # type: ignore[type-arg]
    return [(np.array(slots), length) for slots, length in sets]


def test_slots_become_columns_and_strangers_are_left_out() -> None:
    fleet = a_fleet([4, 0, None])
    prefixes = fleet.prefixes(by_slot(([0, 1, 99], SHORT), ([4], LONG)))
    assert dict(prefixes) == {0: LONG, 1: SHORT} and len(prefixes) == 2
    assert prefixes.get(2) is None and 2 not in prefixes and prefixes.has_lower_tiers
    assert dict(fleet.prefixes([])) == {}


def test_a_worker_is_found_in_its_new_slot_alone() -> None:
    fleet = a_fleet([0, 1])
    fleet.set_slot(fleet.loads[0], 7)
    fleet.set_slot(fleet.loads[1], 0)  # the other's old one
    assert dict(fleet.prefixes(by_slot(([0], SHORT), ([1], LONG), ([7], LONG)))) == {0: LONG, 1: SHORT}
    fleet.set_slot(fleet.loads[1], None)
    assert dict(fleet.prefixes(by_slot(([0, 1, 7], SHORT)))) == {0: SHORT}


@given(lengths=st.dictionaries(st.integers(0, 9), st.sampled_from([SHORT, LONG])))
def test_it_is_the_mapping_that_it_was_made_of(lengths: dict[int, PrefixLength]) -> None:
    prefixes = Prefixes.of(lengths, 10)
    assert dict(prefixes) == lengths
    assert [prefixes.get(column) for column in range(10)] == [lengths.get(column) for column in range(10)]


@given(columns=st.sets(st.integers(0, 600)))
def test_a_mask_is_read_as_the_columns_it_was_made_of(columns: set[int]) -> None:
    assert column_numbers(sum(1 << 4 * column for column in columns)).tolist() == sorted(columns)


def test_holders_of_the_same_are_told_together() -> None:
    index = PrefixIndex(1000)
    names = [BlockHash(bytes([number]) * 16) for number in range(6)]
    slots = [index.join(WorkerId(f"worker-{number}"), "1") for number in range(5)]
    for worker, blocks in enumerate((3, 3, 6, 0, 3)):
        index.restore(WorkerId(f"worker-{worker}"), "1", 1, {"hbm": names[:blocks]})
    told = {length: set(found.tolist()) for found, length in index.holders(names)}
    assert told == {PrefixLength(3): {slots[0], slots[1], slots[4]}, PrefixLength(6): {slots[2]}}
    assert index.match(names) == {slot: length for length, found in told.items() for slot in found}
    index.leave(WorkerId("worker-1"))
    assert index.join(WorkerId("another"), "1") == slots[1]
    assert {length: set(found.tolist()) for found, length in index.holders(names)}[PrefixLength(3)] == {
        slots[0],
        slots[4],
    }
