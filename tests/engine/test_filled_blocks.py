"""Blocks of the pool that are filled for no request: brought up for a peer, or fetched from one."""

from tiered_toy import PROMPT, A, below, names, reference, tiered
from toy_engine import ToyEngine

from engine.interface import Retention


def test_a_prefix_is_promoted_for_a_peer() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    done: list[bool] = []
    assert toy.engine.promote(names(PROMPT), lambda: done.append(True))
    toy.step()
    assert not done and toy.engine.stats().kv_blocks_used == 5
    tiers.restores[-1].finish()
    toy.run()
    assert done == [True]
    held = toy.engine.hold(names(PROMPT))
    assert len(held.blocks) == 5
    toy.engine.let_go(held)
    assert not toy.engine.promote(names(PROMPT), lambda: None), "all of it is in HBM"
    toy.assert_idle()


def test_a_promotion_takes_a_part_of_the_pool_at_most() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    done: list[bool] = []
    assert toy.engine.promote(names(PROMPT), lambda: done.append(True))
    assert len(tiers.restores[-1].blocks) == 3, "a quarter"
    assert not toy.engine.promote(names(PROMPT)[3:], lambda: None)
    tiers.pass_time(10.0)
    toy.run()
    assert done == [True], "it stalled"
    assert toy.engine.hold(names(PROMPT)).blocks == ()
    toy.assert_idle()


def test_a_promotion_that_is_on_its_way_when_the_engine_ends_is_over() -> None:
    toy = tiered()
    below(toy, at_once=False)
    done: list[bool] = []
    toy.engine.promote(names(PROMPT), lambda: done.append(True))
    toy.engine.close()
    assert done == [True]


def test_reserved_blocks_are_filled_from_a_peer_and_found() -> None:
    toy, other = tiered(blocks=24), ToyEngine(blocks=24)
    other.add("b", PROMPT)
    other.run()
    toy.add("first", PROMPT[:9])
    toy.run()
    reserved = toy.engine.reserve(PROMPT, "", 4)
    assert list(reserved.names) == names(PROMPT)[2:4] and len(reserved.held) == 2
    theirs = other.engine.hold(names(PROMPT)[:4])
    toy.region.copy_blocks(other.region, list(zip(reserved.blocks, theirs.blocks[2:], strict=True)))
    toy.engine.check_integrity()
    toy.engine.adopt(reserved, theirs.digests[2:], Retention("acme"))
    toy.add("a", PROMPT)
    toy.run()
    assert toy.first[A].cached_tokens == 16
    assert toy.outputs[A] == reference(PROMPT)
    toy.assert_idle()


def test_what_did_not_come_is_free_again() -> None:
    toy = tiered(blocks=24)
    reserved = toy.engine.reserve(PROMPT, "", 5)
    assert len(reserved.blocks) == 5
    toy.engine.adopt(reserved, (), Retention())
    toy.run()
    assert toy.engine.stats().kv_blocks_free == 24
    toy.assert_idle()


def test_nothing_is_reserved_of_what_lies_here_in_any_tier() -> None:
    toy = tiered(blocks=24)
    below(toy)
    reserved = toy.engine.reserve((*PROMPT, 1, 2, 3, 4), "", 9)
    assert list(reserved.names) == names((*PROMPT, 1, 2, 3, 4))[5:6]
    toy.engine.adopt(reserved, (), Retention())


def test_a_reservation_takes_a_part_of_the_pool_at_most() -> None:
    toy = tiered(blocks=12)
    reserved = toy.engine.reserve(PROMPT, "", 5)
    assert len(reserved.names) == len(reserved.blocks) == 3
    again = toy.engine.reserve(PROMPT, "x", 5)
    assert again.blocks == again.names == ()
    toy.engine.adopt(reserved, (), Retention())
    toy.engine.adopt(again, (), Retention())
    toy.run()
    toy.assert_idle()
