"""Links, leaves and places of the index, and the small parts beside it, against naive models."""

import random
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockHash, TenantTag, tenant_tag
from baton.latency import TIERS
from bench.tier_index import measure_index
from kvcache.name_table import NO_ROW
from kvcache.tiers.index.deadlines import Deadlines
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.promises import Promises
from kvcache.tiers.index.row_set import RowSet
from kvcache.tiers.index.slots import Slots
from kvcache.tiers.index.sweeps import age_orphans, drop_below, remove_gone, rows_of
from kvcache.tiers.index.tenants import NO_TAG, NOBODY, Tenants
from kvcache.tiers.index.tier_index import TierIndex
from kvcache.tiers.interface import LowerTier, Owner, Slot

TENANT = tenant_tag("a")


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def chain_of(index: TierIndex, length: int, tier: str = "ddr") -> list[int]:
    rows = []
    for depth in range(length):
        row = index.add(name(depth + 1), name(depth), depth, TENANT, 0.0)
        index.put(row, tier, depth)  # type: ignore[arg-type]
        rows.append(row)
    return rows


def test_only_what_nothing_hangs_on_may_go() -> None:
    index = TierIndex(4, 4, 4)
    rows = chain_of(index, 3)
    assert [row in index.leaves.of["ddr"] for row in rows] == [False, False, True]
    index.drop(rows[2], "ddr")
    assert rows[1] in index.leaves.of["ddr"]
    index.check_integrity()


def test_a_block_on_the_ssd_does_not_keep_its_head_in_ddr() -> None:
    index = TierIndex(4, 4, 4)
    head, tail = chain_of(index, 2)
    index.put(tail, "ssd", 0)
    index.drop(tail, "ddr")
    assert head in index.leaves.of["ddr"]
    index.put(head, "ssd", 1)
    assert head not in index.leaves.of["ssd"]
    assert tail in index.leaves.of["ssd"]
    index.check_integrity()


def test_what_has_lost_its_head_is_as_old_as_can_be() -> None:
    index = TierIndex(8, 8, 8)
    rows = chain_of(index, 6, "ssd")
    whole = index.add(name(100), name(99), 0, TENANT, 5.0)
    index.put(whole, "ssd", 7)
    index.drop(rows[2], "ssd")
    age_orphans(index)
    assert index.used_at[[*rows[:2], whole]].tolist() == [0.0, 0.0, 5.0]
    assert index.used_at[rows[3:]].tolist() == [-inf] * 3


def test_many_rows_go_at_once_as_they_would_one_by_one() -> None:
    for seed in range(60):
        random_ = random.Random(seed)
        index, model = TierIndex(16, 16, 16), TierIndex(16, 16, 16)
        for number in random_.sample(range(24), 16):
            prompt, depth = divmod(number, 6)
            above = name(1000 * prompt + depth)
            tiers = random_.sample(TIERS, random_.randint(1, 2))
            for each in (index, model):
                row = each.add(name(1000 * prompt + depth + 1), above, depth, TENANT, 0.0)
                for tier in tiers:
                    each.put(row, tier, each.counts[tier])
        rows = [row for row in rows_of(index, None).tolist() if random_.random() < 0.6]
        names = [index.table.name(row) for row in rows]
        places, gone = drop_below(index, np.array(rows, np.int64), ["ddr", "ssd"])
        remove_gone(index, gone)
        lay: dict[LowerTier, list[int]] = {tier: [] for tier in places}
        for gone_name in names:
            for lower in places:
                if model.is_in(row := model.find(gone_name), lower):
                    lay[lower].append(model.drop(row, lower))
        index.check_integrity()
        model.check_integrity()
        assert lay == places
        assert len(index.table) == len(model.table) and index.counts == model.counts
        assert index.unsaved.keys() == {index.find(model.table.name(row)) for row in model.unsaved}
        for number in range(30):  # rows can be given again
            index.table.enter(name(5000 + number))
        index.table.check_integrity()


def test_links_are_right_whatever_came_first() -> None:
    for seed in range(50):
        index, order = TierIndex(8, 8, 8), list(range(8))
        random.Random(seed).shuffle(order)
        for depth in order:
            index.put(index.add(name(depth + 1), name(depth), depth, TENANT, 0.0), "ssd", depth)
            index.check_integrity()
        rows = [index.find(name(depth + 1)) for depth in range(8)]
        assert index.leaves.of["ssd"].sample(9, np.random.default_rng()).tolist() == [rows[-1]]
        for depth in order:
            index.drop(rows[depth], "ssd")
            index.check_integrity()
        assert len(index.table) == 0


def test_a_lost_head_is_remembered_while_blocks_hang_on_it() -> None:
    index = TierIndex(4, 4, 4)
    head, tail = chain_of(index, 2)
    index.drop(head, "ddr")
    assert index.find(name(1)) == NO_ROW
    assert index.header(tail, "none", 0.0).parent == name(1)
    assert index.add(name(1), name(0), 0, TENANT, 0.0) == head
    index.put(head, "ddr", 0)
    index.check_integrity()


def test_a_chain_goes_as_far_as_it_is_used_alike_and_stands_alone() -> None:
    index = TierIndex(8, 8, 8)
    rows = chain_of(index, 5)
    index.uses[rows[:2]] = 3
    assert index.chain(rows[4], "ddr", 8) == [rows[4], rows[3], rows[2]]
    assert index.chain(rows[4], "ddr", 2) == [rows[4], rows[3]]
    index.mark(rows[3], Mark.PINNED, True)
    assert index.chain(rows[4], "ddr", 8) == [rows[4]]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans())))
def test_a_row_set_is_a_set(steps: list[tuple[int, bool]]) -> None:
    rows, model = RowSet(9, 10), set[int]()
    for row, is_member in steps:
        rows.put(row, is_member)
        (model.add if is_member else model.discard)(row)
        assert set(rows.sample(10, np.random.default_rng(0)).tolist()) == model
        assert len(rows) == len(model)
        assert set(rows.sample(2, np.random.default_rng(0)).tolist()) <= model


@given(st.lists(st.tuples(st.sampled_from(["put_off", "discard", "pop"]), st.integers(1, 4), st.integers(0, 20))))
def test_deadlines_end_when_their_time_has_come(steps: list[tuple[str, int, int]]) -> None:
    deadlines, model, now = Deadlines(), dict[int, float](), 0
    for kind, row, time in steps:
        if kind == "put_off":
            deadlines.put_off(row, now + time)
            model[row] = max(model.get(row, 0), now + time)
        elif kind == "discard":
            deadlines.discard(row)
            model.pop(row, None)
        else:
            now += time
            due = {each for each, until in model.items() if until <= now}
            assert set(deadlines.pop_due(now)) == due
            model = {each: until for each, until in model.items() if each not in due}
        assert set(deadlines) == model.keys()
    deadlines.pop_due(1e9)
    assert not deadlines._heap and not deadlines._entry


def test_deadlines_that_never_end_leave_nothing_behind() -> None:
    deadlines = Deadlines()
    for _ in range(100):
        deadlines.put_off(1, inf)
        deadlines.discard(1)
    deadlines.put_off(1, 5.0)
    assert len(deadlines._heap) == 1
    assert deadlines.pop_due(5.0) == [1]


def test_a_held_slot_is_free_only_when_it_is_let_go_and_erased() -> None:
    slots = Slots(4, True)
    first, second = slots.take(2)
    slots.hold([first, first, second])
    slots.give_back(first, erase=True)
    slots.give_back(second)
    slots.let_go([first, second])
    assert (slots.free, slots.to_erase) == (3, [])
    slots.let_go([first])
    assert (slots.free, slots.to_erase) == (3, [first])
    slots.to_erase.clear()
    slots.erased([first])
    assert slots.free == 4
    slots.check_integrity([])


def test_slots_that_nobody_claimed_are_free_after_the_scan() -> None:
    slots = Slots(6, False)
    for slot in (1, 2, 5):
        slots.claim(Slot(slot))
    slots.give_back(Slot(5))
    slots.give_back(Slot(2), erase=True)
    assert slots.free == 0
    slots.free_others([Slot(1)])
    assert (slots.free, slots.to_erase) == (4, [2])
    slots.check_integrity([Slot(1)])


def test_what_free_slots_still_hold_can_be_wiped() -> None:
    slots = Slots(8, True)
    for slot in slots.take(3):
        slots.give_back(slot)
    slots.wipe_free()
    assert (slots.free, len(slots.to_erase)) == (5, 3)
    slots.check_integrity([])


def test_promises_are_given_from_the_head_on_up_to_the_quota() -> None:
    index = TierIndex(8, 8, 0)
    rows = chain_of(index, 5)
    promises = Promises(index, 10)
    promises.give(rows, Owner(TENANT, ttl_s=5.0, quota_bytes=35), now=100.0)
    assert [promises.keep_until(row) for row in rows] == [105.0, 105.0, 105.0, 0.0, 0.0]
    assert promises.promised_bytes(TENANT) == 30
    promises.give(rows[:1], Owner(TENANT, ttl_s=9.0, quota_bytes=0), now=100.0)
    assert promises.keep_until(rows[0]) == 109.0, "what stands may be renewed, whatever the quota is now"
    promises.expire(106.0)
    assert [row in set(promises) for row in rows] == [True, False, False, False, False]
    promises.check_integrity()


def test_a_tenant_has_a_number_while_it_has_blocks() -> None:
    tenants = Tenants()
    tags = [TenantTag(bytes([at] * 8)) for at in range(1, 4)]
    numbers = [tenants.enter(tag) for tag in tags]
    assert len(set(numbers)) == 3 and NOBODY not in numbers
    assert tenants.enter(tags[0]) == numbers[0]
    tenants.leave(numbers[1])
    assert tenants.enter(TenantTag(b"another!")) == numbers[1]
    assert tenants.tag(numbers[1]) == b"another!"
    assert tenants.find(tags[1]) not in {*numbers, NOBODY}
    assert tenants.enter(NO_TAG) == NOBODY


@pytest.mark.parametrize("blocks", [1000, 20_000])
def test_a_block_costs_less_than_a_hundred_bytes(blocks: int) -> None:
    assert measure_index(blocks).bytes_per_block < 100
