from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given

from baton.cluster.cache_events import CacheChanges
from baton.ids import BlockHash, BlockId
from baton.latency import Tier
from engine.cache_journal import CacheJournal, across_tiers

BLOCK = BlockId(3)
A, B, C = (BlockHash(bytes([number]) * 16) for number in range(3))


def apply(held: set[BlockHash], changes: CacheChanges) -> None:
    """What a router does; and nothing is told that says nothing new."""
    for tier, names in changes.stored.items():
        assert tier == "hbm" and names
        assert len(set(names)) == len(names) and held.isdisjoint(names)
        held.update(names)
    assert not changes.moved
    assert len(set(changes.removed)) == len(changes.removed) and held.issuperset(changes.removed)
    held.difference_update(changes.removed)


def test_what_happened_comes_in_the_order_in_which_it_happened() -> None:
    journal = CacheJournal()
    for name in (C, A, B):
        journal.stored(BLOCK, name)
    assert journal.take() == CacheChanges({"hbm": (C, A, B)})
    for name in (B, C):
        journal.removed(BLOCK, name)
    assert journal.take() == CacheChanges(removed=(B, C))


def test_nothing_happened() -> None:
    assert not CacheJournal().take()


def test_what_was_told_is_not_told_again() -> None:
    journal = CacheJournal()
    journal.stored(BLOCK, A)
    told = journal.take()
    assert told == CacheChanges({"hbm": (A,)})
    assert not journal.take()
    journal.stored(BLOCK, B)
    assert told == CacheChanges({"hbm": (A,)}), "what was handed out stays as it was"


def test_stored_and_removed_again_is_nothing() -> None:
    journal = CacheJournal()
    journal.stored(BLOCK, A)
    journal.removed(BLOCK, A)
    assert not journal.take()
    journal.stored(BLOCK, A)
    assert journal.take() == CacheChanges({"hbm": (A,)})


def test_removed_and_stored_again_is_nothing() -> None:
    journal = CacheJournal()
    journal.stored(BLOCK, A)
    journal.take()
    journal.removed(BLOCK, A)
    journal.stored(BlockId(9), A)
    assert not journal.take()
    journal.removed(BlockId(9), A)
    assert journal.take() == CacheChanges(removed=(A,))


@given(st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=12))
def test_the_net_of_each_step_makes_what_is_there_now(steps: Sequence[Sequence[int]]) -> None:
    """Each number turns one block's presence around."""
    journal, now, told = CacheJournal(), set[BlockHash](), set[BlockHash]()
    for step in steps:
        for number in step:
            name = BlockHash(bytes([number]) * 16)
            if name in now:
                journal.removed(BLOCK, name)
            else:
                journal.stored(BLOCK, name)
            now ^= {name}
        apply(told, journal.take())
        assert told == now


# ---- across tiers


class Tiers:
    """Where blocks are now, and of which it may have changed."""

    def __init__(self, where: dict[BlockHash, Tier], *changed: BlockHash) -> None:
        self._where, self._changed = where, changed

    def tier_of(self, name: BlockHash) -> Tier | None:
        return self._where.get(name)

    def changed(self) -> Sequence[BlockHash]:
        return self._changed


def test_a_block_is_told_in_the_highest_tier_that_has_it() -> None:
    pool = CacheChanges({"hbm": (A,)}, removed=(B, C))
    assert across_tiers(pool, Tiers({A: "hbm", B: "ddr"}, A, B, C)) == CacheChanges(
        {"hbm": (A,)}, {"ddr": (B,)}, removed=(C,)
    )


def test_a_copy_below_a_block_is_nothing_new() -> None:
    assert not across_tiers(CacheChanges(), Tiers({A: "hbm"}, A))


def test_what_moves_below_the_pool_is_told() -> None:
    assert across_tiers(CacheChanges(), Tiers({A: "ssd"}, A, B)) == CacheChanges(moved={"ssd": (A,)}, removed=(B,))


def test_nothing_happened_in_any_tier() -> None:
    assert not across_tiers(CacheChanges(), Tiers({A: "ssd"}))


@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.sampled_from((None, "hbm", "ddr", "ssd"))))))
def test_whatever_happens_the_net_is_where_blocks_are_now(
    steps: Sequence[Sequence[tuple[int, Tier | None]]],
) -> None:
    """What is below HBM may be in HBM, too, and not the other way round; all that may have changed is named."""
    journal, told = CacheJournal(), dict[BlockHash, Tier]()
    where: dict[BlockHash, Tier] = {}
    for step in steps:
        changed = set[BlockHash]()
        for number, tier in step:
            name = BlockHash(bytes([number]) * 16)
            if (where.get(name) == "hbm") != (tier == "hbm"):
                (journal.stored if tier == "hbm" else journal.removed)(BLOCK, name)
            where.pop(name, None)
            if tier is not None:
                where[name] = tier
            changed.add(name)
        changes = across_tiers(journal.take(), Tiers(where, *changed))
        for groups in (changes.stored, changes.moved):
            told.update({name: tier for tier, names in groups.items() for name in names})
        for name in changes.removed:
            told.pop(name, None)
        assert told == where
