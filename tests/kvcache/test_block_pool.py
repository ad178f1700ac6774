"""The pool against a naive model of it, and the decisions that the model does not fix."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.ids import BlockHash, BlockId
from kvcache.block_pool import BlockPool


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


class Recorder:
    """What a listener believes to be in the cache."""

    def __init__(self) -> None:
        self.blocks: dict[BlockId, BlockHash] = {}
        self.unflushed: list[BlockId] = []

    def stored(self, block: BlockId, name: BlockHash) -> None:
        assert block not in self.blocks
        self.blocks[block] = name

    def removed(self, block: BlockId, name: BlockHash) -> None:
        assert self.blocks.pop(block) == name
        self.unflushed.append(block)

    def flush(self) -> None:
        assert self.unflushed, "nothing was removed since"
        self.unflushed.clear()


class PoolMachine(RuleBasedStateMachine):
    """Sequences hold lists of blocks; the model keeps who holds what, and what is cached, as plain sets.

    Which cached block goes first is the pool's choice, and tested below.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heard = Recorder()
        self.pool = BlockPool(12, self.heard)
        self.sequences: list[list[BlockId]] = []
        self.published: dict[BlockHash, BlockId] = {}
        self.idle: set[BlockId] = set()

    def held(self) -> set[BlockId]:
        return {block for sequence in self.sequences for block in sequence}

    @rule(data=st.data(), count=st.integers(1, 5))
    def allocate(self, data: st.DataObject, count: int) -> None:
        if count > self.pool.available:
            return
        after = data.draw(st.sampled_from([None, *sorted(self.held())]))
        evicted = max(0, count - self.pool.free)
        blocks = self.pool.allocate(count, after)
        assert len(set(blocks)) == count
        assert not self.held() & set(blocks)
        gone = {block for block in self.published.values() if block not in self.heard.blocks}
        assert len(gone) == evicted
        assert gone <= self.idle
        self.idle -= gone
        assert not self.idle & set(blocks)
        self.published = {n: block for n, block in self.published.items() if block not in gone}
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), number=st.integers(0, 5))
    def publish(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        if block in self.published.values():
            return
        self.pool.publish(block, name(number))
        self.published.setdefault(name(number), block)

    @rule(numbers=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    def match_and_hold(self, numbers: list[int]) -> None:
        match = self.pool.match(map(name, numbers))
        expected: list[BlockId] = []
        for number in numbers:
            if name(number) not in self.published:
                break
            expected.append(self.published[name(number)])
        assert list(match.blocks) == expected
        assert match.idle == len(set(expected) & self.idle)
        self.pool.hold(match.blocks)
        self.idle -= set(expected)
        if expected:
            self.sequences.append(expected)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(blocks)
        held = self.held()
        self.idle |= {b for b in blocks if b not in held and b in self.published.values()}

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used == len(self.held())
        assert self.pool.cached == len(self.idle)
        assert self.pool.free == self.pool.total - self.pool.used - self.pool.cached
        assert self.heard.blocks == {block: n for n, block in self.published.items()}
        assert not self.heard.unflushed
        upcoming = self.pool.upcoming(12)
        assert sorted(block for block, _ in upcoming) == sorted(self.idle)
        assert all(self.published[name] == block for block, name in upcoming)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], name(0))
    pool.release(blocks)
    pool.allocate(3)
    assert pool.match([name(0)]).blocks == (blocks[0],)


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for number, block in enumerate(blocks):
        pool.publish(block, name(number))
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[3]]
    assert pool.match([name(0), name(1), name(2), name(3)]).blocks == tuple(blocks[:3])


def test_what_was_used_since_the_last_sweep_has_a_second_chance() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for number, block in enumerate(blocks):
        pool.publish(block, name(number))
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[3]], "none was used since: the first that the hand comes to"
    pool.hold(blocks[2:3])
    pool.release(blocks[2:3])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.allocate(1) == [blocks[0]]
    assert pool.allocate(1) == [blocks[2]]


def test_a_full_pool_is_evicted_in_runs() -> None:
    """Growing by one block again and again still gives neighbours."""
    pool = BlockPool(256)
    blocks = pool.allocate(256)
    for number, block in enumerate(blocks):
        pool.publish(block, name(number))
    pool.release(blocks)
    first = pool.allocate(1)
    assert pool.free == 7
    second = pool.allocate(1, after=first[0])
    assert second == [first[0] + 1]


def test_a_fragmented_pool_evicts_a_run_rather_than_scatter_a_sequence() -> None:
    pool = BlockPool(64)
    blocks = pool.allocate(64)
    crumbs = blocks[::16]
    sequence = [block for block in blocks if block not in crumbs]
    for number, block in enumerate(sequence):
        pool.publish(block, name(number))
    pool.release(sequence)
    pool.release(crumbs)
    scattered = pool.allocate(4)
    assert scattered == list(range(scattered[0], scattered[0] + 4))
    assert pool.cached == len(sequence) - 4
    pool.check_integrity()


def test_eviction_for_the_sake_of_a_run_is_bounded() -> None:
    pool = BlockPool(64)
    blocks = pool.allocate(64)
    for number, block in enumerate(blocks[::2]):
        pool.publish(block, name(number))
    pool.release(blocks)
    pool.allocate(32)
    assert pool.cached == 32, "enough was free already"


def test_a_second_copy_is_not_found_but_kept_apart() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.publish(first[0], name(0))
    pool.publish(second[0], name(0))
    pool.release(second)
    assert (pool.free, pool.cached) == (1, 0)
    assert pool.match([name(0)]).blocks == tuple(first)


def test_what_is_upcoming_is_what_is_evicted_next() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(8)
    for number, block in enumerate(blocks):
        pool.publish(block, name(number))
    pool.release(blocks)
    pool.allocate(1)
    pool.hold(blocks[5:6])
    pool.release(blocks[5:6])
    upcoming = pool.upcoming(3)
    assert upcoming == [(blocks[6], name(6)), (blocks[4], name(4)), (blocks[3], name(3))]
    assert pool.upcoming(8)[-1] == (blocks[5], name(5)), "it has been used since"
    given = [pool.allocate(1)[0] for _ in upcoming]
    assert given == [block for block, _ in upcoming]


def test_what_was_held_for_no_use_has_no_second_chance() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for number, block in enumerate(blocks):
        pool.publish(block, name(number))
    pool.release(blocks)
    pool.allocate(1)
    pool.hold(blocks[2:3])
    pool.release(blocks[2:3], is_used=False)
    assert pool.allocate(1) == [blocks[2]]


def test_bugs_of_the_caller_are_caught() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    pool.publish(blocks[0], name(0))
    with pytest.raises(AssertionError):
        pool.publish(blocks[0], name(1))
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_integrity_check_sees_damage() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool._holders[0] = pool._holders[1] = 0
    with pytest.raises(AssertionError):
        pool.check_integrity()
