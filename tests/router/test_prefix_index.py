from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Literal

import pytest

from baton.clock import ManualClock
from baton.cluster.cache_events import CacheChanges, CacheEvents
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from router.index.block_table import INTERNED_MAX, SHARDS, keys_of
from router.index.prefix_index import EXPECT_S, Applied, Doubt, Freshness, PrefixIndex, PrefixLength

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(sha256(str(number).encode()).digest()[:16]) for number in numbers)


CHAIN = names(*range(10))


class Rig:
    """An index on a manual clock, and workers that number their batches."""

    def __init__(self, *workers: WorkerId, blocks_max: int = 1000) -> None:
        self.clock = ManualClock(100.0)
        self.index = PrefixIndex(blocks_max, self.clock)
        self.sequence = dict.fromkeys(workers, 0)
        for worker in workers:
            self.index.join(worker, "1")
            self.index.restore(worker, "1", 0, {})

    def changed(self, worker: WorkerId, changes: CacheChanges, epoch: str = "1") -> Applied:
        self.sequence[worker] += 1
        return self.index.apply(worker, CacheEvents.of(epoch, self.sequence[worker], changes))

    def stored(self, worker: WorkerId, blocks: Iterable[BlockHash], tier: Tier = "hbm") -> Applied:
        return self.changed(worker, CacheChanges({tier: tuple(blocks)}))

    def removed(self, worker: WorkerId, blocks: Iterable[BlockHash]) -> Applied:
        return self.changed(worker, CacheChanges(removed=tuple(blocks)))

    def match(self, blocks: Sequence[BlockHash] = CHAIN) -> dict[WorkerId, PrefixLength]:
        worker_of = {self.index.slot_of(worker): worker for worker in (A, B, C)}
        found = {worker_of[slot]: length for slot, length in self.index.match(tuple(blocks)).items()}
        self.index.check_integrity()
        return found

    def tidy(self) -> None:
        while self.index.tidy():
            self.index.check_integrity()


def hbm(blocks: int) -> PrefixLength:
    return PrefixLength(blocks)


# ---- matching


def test_the_longest_prefix_of_each_worker_is_found() -> None:
    rig = Rig(A, B, C)
    rig.stored(A, CHAIN[:7])
    rig.stored(B, CHAIN[:3])
    rig.stored(C, CHAIN[1:])
    assert rig.match() == {A: hbm(7), B: hbm(3)}, "C lacks the first block, without which the rest is of no use"
    rig.stored(C, CHAIN[:1])
    assert rig.match() == {A: hbm(7), B: hbm(3), C: hbm(10)}


def test_a_hole_ends_the_prefix() -> None:
    rig = Rig(A, B)
    rig.stored(A, CHAIN)
    rig.stored(B, CHAIN)
    rig.removed(A, CHAIN[4:5])
    assert rig.match() == {A: hbm(4), B: hbm(10)}
    rig.removed(B, CHAIN[4:5])
    assert rig.match() == {A: hbm(4), B: hbm(4)}


def test_a_prefix_is_told_by_tier() -> None:
    rig = Rig(A, B)
    rig.stored(A, CHAIN[:4])
    rig.stored(A, CHAIN[4:7], "ddr")
    rig.stored(A, CHAIN[7:9], "ssd")
    rig.stored(B, CHAIN[:5])
    assert rig.match() == {A: PrefixLength(4, 3, 2), B: hbm(5)}
    rig.changed(A, CacheChanges(moved={"hbm": CHAIN[4:6], "ssd": CHAIN[:1]}))
    assert rig.match() == {A: PrefixLength(5, 1, 3), B: hbm(5)}
    assert rig.match()[A].total == 9


def test_one_batch_is_applied_in_the_order_of_its_fields() -> None:
    rig = Rig(A)
    first, second, third = CHAIN[:3]
    rig.changed(A, CacheChanges({"hbm": (first, second, third)}, {"ddr": (second, third)}, (third,)))
    assert rig.match() == {A: PrefixLength(1, 1)}


def test_nothing_matches_nothing() -> None:
    rig = Rig(A)
    assert rig.match(()) == {} and rig.match() == {}
    rig.stored(A, CHAIN)
    assert rig.match(()) == {} and rig.match(names(77)) == {}


@pytest.mark.parametrize("order", ["little", "big"])
def test_names_are_told_apart_wherever_their_bytes_differ(order: Literal["little", "big"]) -> None:
    numbered = b"".join(number.to_bytes(16, order) for number in range(5000))
    keys = keys_of(numbered).keys
    assert len(set(keys)) == 5000 and max(keys) < 2**60


# ---- order


def test_a_batch_counts_once() -> None:
    rig = Rig(A)
    first = CacheEvents.of("1", 1, CacheChanges({"hbm": CHAIN[:1]}))
    second = CacheEvents.of("1", 2, CacheChanges(removed=CHAIN[:1]))
    assert [rig.index.apply(A, each) for each in (first, second, first)] == [
        Applied.APPLIED,
        Applied.APPLIED,
        Applied.DUPLICATE,
    ]
    assert rig.match() == {} and rig.index.sequence_of(A) == 2


def test_after_a_gap_a_worker_is_believed_but_stale_until_its_snapshot() -> None:
    rig = Rig(A)
    rig.stored(A, CHAIN[:2])
    rig.clock.advance(5)
    assert rig.index.apply(A, CacheEvents.of("1", 3, CacheChanges({"hbm": CHAIN[2:4]}))) is Applied.GAP
    assert rig.match() == {A: hbm(4)}
    assert rig.index.freshness(A) == Freshness((Doubt.EVENTS_MISSING,), 105.0) and rig.index.sequence_of(A) == 1
    assert rig.index.apply(A, CacheEvents.of("1", 4, CacheChanges({"hbm": CHAIN[4:5]}))) is Applied.GAP
    rig.index.restore(A, "1", 4, {"hbm": CHAIN[:1], "ddr": CHAIN[1:2]})
    assert rig.match() == {A: PrefixLength(1, 1)} and rig.index.freshness(A).is_fresh
    assert rig.index.apply(A, CacheEvents.of("1", 5, CacheChanges({"hbm": CHAIN[2:3]}))) is Applied.APPLIED


def test_events_before_any_snapshot_are_a_gap() -> None:
    rig = Rig()
    rig.index.join(A, "1")
    assert rig.index.freshness(A).doubts == (Doubt.NO_SNAPSHOT,)
    assert rig.index.apply(A, CacheEvents("1", 1)) is Applied.GAP
    rig.index.restore(A, "1", 1, {})
    assert rig.index.stale() == {}


def test_strangers_and_other_lives_change_nothing() -> None:
    rig = Rig(A)
    events = CacheEvents.of("2", 1, CacheChanges({"hbm": CHAIN}))
    assert rig.index.apply(A, events) is Applied.FOREIGN and rig.index.apply(B, events) is Applied.FOREIGN
    rig.index.restore(A, "2", 9, {"hbm": CHAIN})
    rig.index.restore(B, "2", 9, {"hbm": CHAIN})
    assert rig.match() == {} and rig.index.sequence_of(A) == 0


# ---- members


def test_joining_again_is_nothing_new_and_another_epoch_starts_empty() -> None:
    rig = Rig(A, B)
    rig.stored(A, CHAIN)
    rig.stored(B, CHAIN[:3])
    slot = rig.index.slot_of(A)
    assert rig.index.join(A, "1") == slot and rig.match()[A] == hbm(10)
    assert rig.index.join(A, "2") == slot
    assert rig.match() == {B: hbm(3)} and rig.index.freshness(A).doubts == (Doubt.NO_SNAPSHOT,)


def test_a_slot_is_used_again_without_its_old_blocks() -> None:
    rig = Rig(A, B)
    rig.stored(A, CHAIN)
    slot = rig.index.slot_of(A)
    rig.index.leave(A)
    rig.index.leave(A)
    assert rig.index.slot_of(A) is None and A not in rig.index and rig.match() == {}
    assert rig.index.join(C, "1") == slot
    rig.index.restore(C, "1", 0, {})
    assert rig.match() == {}
    rig.tidy()
    assert rig.match() == {} and len(rig.index) == 0


def test_columns_of_the_departed_are_swept_and_used_again() -> None:
    rig = Rig(A, B)
    rig.stored(B, CHAIN[:2])
    for life in range(2, 30):
        rig.stored(A, CHAIN)
        rig.index.join(A, str(life))
        rig.index.restore(A, str(life), 0, {})
        rig.sequence[A] = 0
        rig.changed(A, CacheChanges({"hbm": CHAIN[:1]}), str(life))
        rig.tidy()
        assert rig.match() == {A: hbm(1), B: hbm(2)} and len(rig.index) == 2
        rig.index.join(A, "1")
        rig.index.restore(A, "1", 0, {})
        rig.sequence[A] = 0
    assert rig.index._table._columns <= 6


def test_a_worker_that_leaves_amid_a_sweep_is_swept_by_the_next() -> None:
    rig = Rig(A, B, C)
    for worker in (A, B, C):
        rig.stored(worker, CHAIN)
    rig.index.leave(A)
    for _ in range(SHARDS // 2):
        assert rig.index.tidy()
    rig.index.leave(B)
    assert rig.match() == {C: hbm(10)}
    rig.tidy()
    assert rig.match() == {C: hbm(10)}
    assert set(rig.index._table.states()) == {rig.index._members[C].column.tiers["hbm"]}


def test_a_snapshot_in_pieces_counts_when_it_is_finished() -> None:
    rig = Rig(A)
    rig.stored(A, CHAIN[:2])
    restoration = rig.index.begin_restore(A, "1")
    restoration.add("hbm", b"".join(CHAIN[:1]))
    rig.stored(A, CHAIN[2:3])
    assert rig.match() == {A: hbm(3)}
    restoration.add("ddr", b"".join(CHAIN[1:5]))
    assert restoration.finish(9) and rig.match() == {A: PrefixLength(1, 4)} and rig.index.sequence_of(A) == 9
    abandoned = rig.index.begin_restore(A, "1")
    abandoned.add("hbm", b"".join(CHAIN))
    abandoned.abandon()
    late = rig.index.begin_restore(A, "1")
    late.add("hbm", b"".join(CHAIN))
    rig.index.leave(A)
    assert not late.finish(10)
    rig.tidy()
    assert len(rig.index) == 0


# ---- what this router sent


def test_what_was_sent_counts_at_once_and_for_a_while() -> None:
    rig = Rig(A, B)
    rig.stored(A, CHAIN[:4])
    rig.index.expect([A, B, WorkerId("stranger")], CHAIN[:6])
    assert rig.match() == {A: hbm(6), B: hbm(6)}
    rig.clock.advance(EXPECT_S - 1)
    rig.tidy()
    assert rig.match() == {A: hbm(6), B: hbm(6)}
    rig.clock.advance(1)
    rig.tidy()
    assert rig.match() == {A: hbm(4)} and len(rig.index) == 4


def test_what_is_confirmed_stays_and_what_is_removed_goes() -> None:
    rig = Rig(A)
    rig.index.expect([A], CHAIN[:4])
    rig.stored(A, CHAIN[:2])
    rig.stored(A, CHAIN[2:3])
    rig.removed(A, CHAIN[2:3])
    assert rig.match() == {A: hbm(2)}
    rig.clock.advance(EXPECT_S)
    rig.tidy()
    assert rig.match() == {A: hbm(2)} and len(rig.index) == 2


def test_what_a_stale_worker_was_sent_stays_expected() -> None:
    rig = Rig(A, B)
    rig.index.expect([A, B], CHAIN[:4])
    rig.index.doubt(A, Doubt.REDIS_AWAY)
    rig.index.doubt(B, Doubt.REDIS_AWAY)
    rig.index.trust(B, Doubt.REDIS_AWAY)
    for _ in range(3):
        rig.clock.advance(EXPECT_S)
        rig.tidy()
    assert rig.match() == {A: hbm(4)}
    rig.index.trust(A, Doubt.REDIS_AWAY)
    rig.clock.advance(EXPECT_S)
    rig.tidy()
    assert rig.match() == {}


def test_a_snapshot_keeps_what_was_sent_lately_and_nothing_older() -> None:
    rig = Rig(A)
    rig.index.doubt(A, Doubt.EVENTS_MISSING)
    rig.index.expect([A], CHAIN[:2])
    rig.clock.advance(EXPECT_S)
    rig.tidy()
    rig.index.expect([A], names(50, 51))
    rig.index.restore(A, "1", 4, {})
    assert rig.match() == {} and rig.match(names(50, 51)) == {A: hbm(2)}


def test_a_new_life_is_not_expected_to_have_what_the_old_one_was_sent() -> None:
    rig = Rig(A)
    rig.index.expect([A], CHAIN)
    rig.index.join(A, "2")
    rig.index.restore(A, "2", 0, {})
    assert rig.match() == {}
    rig.clock.advance(EXPECT_S)
    rig.tidy()
    assert rig.match() == {}


def test_expectations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.index.expectations.EXPECTED_BLOCKS_MAX", 100)
    rig = Rig(A)
    rig.index.doubt(A, Doubt.REDIS_AWAY)
    for number in range(50):
        rig.index.expect([A], names(*range(10 * number, 10 * number + 10)))
    rig.tidy()
    assert rig.index._expectations.blocks <= 100 and len(rig.index) <= 100
    assert rig.match(names(*range(490, 500))) == {A: hbm(10)} and rig.match() == {}


def test_a_list_that_grew_is_looked_up_anew() -> None:
    rig = Rig(A)
    growing = list(CHAIN[:2])
    rig.index.expect([A], growing)
    assert rig.index.match(growing) == {0: hbm(2)}
    growing.append(CHAIN[2])
    rig.index.expect([A], growing)
    assert rig.index.match(growing) == {0: hbm(3)}


# ---- bounds


def test_past_the_bound_nothing_new_is_learned_and_that_is_said() -> None:
    rig = Rig(A, B, blocks_max=13)
    rig.stored(A, CHAIN)
    assert rig.stored(B, CHAIN[:3]) is Applied.APPLIED, "known blocks take no room"
    assert rig.index.freshness(B).is_fresh
    others = names(*range(100, 110))
    assert rig.stored(B, others) is Applied.APPLIED
    assert len(rig.index) == 13 and rig.match(others) == {B: hbm(3)} and rig.match()[A] == hbm(10)
    assert rig.index.freshness(B).doubts == (Doubt.INDEX_FULL,) and rig.index.freshness(A).is_fresh
    rig.index.expect([A], names(200, 201))
    assert len(rig.index) == 13 and not rig.index.has_room
    rig.index.leave(A)
    rig.tidy()
    assert rig.index.has_room
    rig.index.restore(B, "1", 2, {"hbm": (*CHAIN[:1], *others)})
    rig.tidy()
    assert rig.index.freshness(B).is_fresh and rig.match(others) == {B: hbm(10)}


def test_a_snapshot_that_does_not_fit_leaves_its_worker_stale() -> None:
    rig = Rig(A, blocks_max=4)
    rig.index.restore(A, "1", 3, {"hbm": CHAIN})
    assert rig.match() == {A: hbm(4)} and rig.index.freshness(A).doubts == (Doubt.INDEX_FULL,)


def test_states_shared_between_blocks_are_bounded() -> None:
    rig = Rig(A, B, blocks_max=10**6)
    table = rig.index._table
    table._interned |= {-number: -number for number in range(2, INTERNED_MAX + 2)}
    rig.stored(A, CHAIN)
    rig.stored(B, CHAIN)
    assert len(table._interned) < 10 and rig.match() == {A: hbm(10), B: hbm(10)}


def test_memory_is_some_eighty_bytes_a_block() -> None:
    rig = Rig(*(WorkerId(f"w{number}") for number in range(64)), blocks_max=10**6)
    for number in range(64):
        rig.stored(WorkerId(f"w{number}"), names(*range(number * 500, number * 500 + 1000)))
    assert 50 < rig.index.size_bytes / len(rig.index) < 150
