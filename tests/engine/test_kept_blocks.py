"""Blocks that stay out of the pool: of abandoned requests until they are reclaimed, of readers until they let go."""

from collections.abc import Sequence

import pytest
from toy_engine import ToyEngine

from baton.ids import BlockHash, RequestId
from engine.interface import Prefill
from kvcache.block_hash import block_hashes, root_hash

A, B = RequestId("a"), RequestId("b")
PROMPT = tuple(range(1, 12))


def names(tokens: Sequence[int]) -> list[BlockHash]:
    return block_hashes(root_hash("toy", 4, "float32"), tokens, 4)


def reserve(toy: ToyEngine, name: str = "a") -> None:
    toy.admitted.pop(RequestId(name), None)
    toy.add(name, PROMPT, Prefill.ELSEWHERE)
    toy.step()


# ---- abandoned


def test_abandoned_blocks_are_used_by_nobody_until_they_are_reclaimed() -> None:
    toy = ToyEngine(blocks=8)
    reserve(toy)
    abandoned = toy.admitted[A].blocks
    toy.engine.abandon(A)
    assert toy.engine.stats().kv_blocks_used == 3
    reserve(toy)
    assert not set(abandoned) & set(toy.admitted[A].blocks)
    toy.engine.check_integrity()
    toy.engine.prefill_here(A)
    toy.run()
    assert len(toy.outputs[A]) == 4
    assert toy.engine.stats().kv_blocks_used == 3
    toy.engine.reclaim(A)
    toy.assert_idle()


def test_a_request_waits_for_blocks_that_are_abandoned() -> None:
    toy = ToyEngine(blocks=4)
    reserve(toy)
    toy.engine.abandon(A)
    toy.add("b", PROMPT)
    assert not toy.engine.has_work
    toy.engine.reclaim(A)
    toy.run()
    assert len(toy.outputs[B]) == 4
    toy.assert_idle()


def test_cached_blocks_go_back_at_once() -> None:
    """Nobody was to write into these."""
    toy = ToyEngine()
    toy.add("b", PROMPT)
    toy.run()
    reserve(toy)
    assert toy.admitted[A].cached_tokens == 8
    toy.engine.abandon(A)
    assert toy.engine.stats().kv_blocks_used == 1
    toy.engine.reclaim(A)
    toy.assert_idle()


def test_a_request_may_be_abandoned_again_and_again() -> None:
    toy = ToyEngine()
    for _ in range(3):
        reserve(toy)
        toy.engine.abandon(A)
    assert toy.engine.stats().kv_blocks_used == 9
    toy.engine.check_integrity()
    toy.engine.reclaim(A)
    toy.engine.reclaim(A)
    toy.assert_idle()


def test_a_commit_that_was_under_way_is_forgotten() -> None:
    toy = ToyEngine()
    reserve(toy)
    toy.engine.commit(A, 1, ())
    toy.engine.abandon(A)
    toy.engine.abandon(A)
    toy.run()
    assert A not in toy.outputs
    toy.engine.reclaim(A)
    toy.assert_idle()


def test_only_reserved_requests_are_abandoned() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT)
    toy.step()
    with pytest.raises(AssertionError):
        toy.engine.abandon(A)
    toy.engine.abort(A)
    toy.engine.abandon(B)
    toy.engine.reclaim(B)
    toy.assert_idle()


# ---- held


def test_held_blocks_stay_though_others_need_room() -> None:
    toy = ToyEngine(blocks=8)
    toy.add("a", PROMPT)
    toy.run()
    held = toy.engine.hold(names(PROMPT))
    before = toy.region.digests(held.blocks)
    for index in range(4):
        toy.add(f"r{index}", range(20 + index, 40 + index), max_tokens=2)
        toy.run()
    assert toy.region.digests(held.blocks) == before
    assert toy.engine.stats().kv_blocks_used == 2
    toy.engine.let_go(held)
    toy.assert_idle()


def test_what_is_held_is_the_longest_run_that_is_cached() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT)
    toy.run()
    assert len(toy.engine.hold([*names(PROMPT), BlockHash(bytes(16))]).blocks) == 2
    assert toy.engine.hold([BlockHash(bytes(16)), *names(PROMPT)]).blocks == ()
    assert toy.engine.hold([]).blocks == ()


def test_each_hold_is_let_go_once() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT)
    toy.run()
    one, other = toy.engine.hold(names(PROMPT)), toy.engine.hold(names(PROMPT))
    assert one == other
    toy.engine.check_integrity()
    toy.engine.let_go(one)
    toy.engine.check_integrity()
    assert toy.engine.stats().kv_blocks_used == len(one.blocks)
    toy.engine.let_go(other)
    toy.assert_idle()
    with pytest.raises(AssertionError):
        toy.engine.let_go(one)
