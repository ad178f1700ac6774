"""An engine with tiers below its pool, over the toy model: a wrong or stale block shows as a wrong token."""

from collections.abc import Sequence
from random import Random

import pytest
from fake_tiers import FakeTiers
from tiered_toy import PROMPT, A, B, below, names, reference, tiered, tiers_of
from toy_engine import ToyEngine, toy_entries

from baton.ids import BlockHash, RequestId, tenant_tag
from baton.latency import DEFAULT_LATENCY
from baton.sampling import SamplingParams
from engine.interface import BlocksWritten, EngineRequest, Prefill, Retention
from engine.scheduler import Limits

OTHER = tuple(range(30, 45))

# ---- up, when all is well


def test_what_was_evicted_is_restored_instead_of_computed() -> None:
    toy = tiered()
    below(toy)
    steps = len(toy.runner.steps)
    toy.add("a", PROMPT)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    assert toy.runner.steps[steps][0].start == 20
    generated = toy.first[A]
    assert (generated.cached_tokens, generated.restored_tokens) == (20, 20)
    assert toy.engine.stats().tier_hits_tokens == {"ddr": 20}
    toy.assert_idle()


def test_a_restore_that_has_ended_is_told() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    assert toy.step().restored == ()
    tiers.restores[-1].finish()
    (timing,) = toy.step().restored
    assert (timing.tier, timing.size_bytes) == ("ddr", 500)


def test_restored_blocks_are_prefix_cache_and_their_digests_known() -> None:
    toy = tiered()
    tiers = below(toy)
    toy.add("a", PROMPT)
    toy.run()
    held = toy.engine.hold(names(PROMPT))
    assert len(held.blocks) == 5
    assert list(held.digests) == toy.region.digests(held.blocks) == [tiers.rows[name].digest for name in names(PROMPT)]
    toy.engine.let_go(held)


def test_blocks_in_the_pool_and_below_it_may_alternate() -> None:
    toy = tiered()
    tiers = below(toy)
    toy.add("a", PROMPT)
    toy.run()
    pool = toy.engine._scheduler.pool
    gone = [pool.find(names(PROMPT)[index]) for index in (1, 3)]
    for block in gone:
        assert block is not None
        pool._evict(block)
    tiers.flush()
    toy.add("b", PROMPT)
    toy.run()
    assert toy.outputs[B] == reference(PROMPT)
    assert [list(restore.names) for restore in tiers.restores[1:]] == [[names(PROMPT)[1], names(PROMPT)[3]]]
    assert toy.first[B].cached_tokens == 20
    assert toy.first[B].restored_tokens == 8


def test_what_is_quicker_to_compute_is_computed() -> None:
    toy = tiered()
    tiers = below(toy)
    slow = DEFAULT_LATENCY.__class__(
        DEFAULT_LATENCY.prefill, DEFAULT_LATENCY.decode, DEFAULT_LATENCY.transfer, {"ddr": DEFAULT_LATENCY.transfer}
    )
    toy.engine.latency = lambda: slow.__class__(
        slow.prefill, slow.decode, slow.transfer, {"ddr": slow.transfer.__class__(latency_s=9.0, bytes_per_s=1.0)}
    )
    toy.add("a", PROMPT)
    toy.run()
    assert not tiers.restores
    assert toy.outputs[A] == reference(PROMPT)
    assert toy.first[A].cached_tokens == 0


def test_behind_a_long_restore_of_another_it_is_computed() -> None:
    toy = tiered(blocks=24)
    toy.add("other", OTHER)
    toy.run()
    tiers = below(toy, at_once=False)
    assert all(tiers.tier_of(name) == "ddr" for name in names(OTHER))
    toy.add("a", PROMPT)
    toy.step()
    toy.add("b", OTHER)
    toy.run()
    assert len(tiers.restores) == 1 and toy.first[B].cached_tokens == 0
    assert toy.outputs[B] == reference(OTHER)
    toy.engine.abort(A)
    toy.run()
    toy.assert_idle()


def test_others_go_on_while_one_is_restored() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.add("b", [30, 31, 32])
    for _ in range(6):
        toy.step()
    assert toy.outputs[B] == reference([30, 31, 32])
    assert A not in toy.outputs
    assert not toy.engine.has_work, "nothing to do but wait"
    tiers.restores[-1].finish()
    assert toy.engine.has_work
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)


def test_the_owner_is_told_with_every_use() -> None:
    toy = tiered()
    tiers = below(toy)
    request = EngineRequest(
        A, PROMPT, SamplingParams(max_tokens=1), Prefill.HERE, retention=Retention("acme", 60.0, True, 1000)
    )
    toy.engine.add(request)
    toy.run()
    blocks, owner = tiers.uses[-1]
    assert blocks == 5
    assert (owner.tenant, owner.ttl_s, owner.pin, owner.quota_bytes) == (tenant_tag("acme"), 60.0, True, 1000)


# ---- up, when something goes wrong


@pytest.mark.parametrize("bad", range(5))
def test_a_corrupt_block_is_computed_again_with_all_after_it(bad: int) -> None:
    toy = tiered()
    tiers = below(toy)
    tiers.corrupt = {names(PROMPT)[bad]}
    steps = len(toy.runner.steps)
    toy.add("a", PROMPT)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    assert toy.runner.steps[steps][0].start == 4 * bad
    assert (toy.first[A].cached_tokens, toy.first[A].restored_tokens) == (4 * bad, 4 * bad)
    toy.assert_idle()


def test_shared_blocks_behind_a_corrupt_one_are_not_written_to() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy)
    toy.add("a", PROMPT, max_tokens=8)
    toy.step()
    toy.step()
    pool = toy.engine._scheduler.pool
    fourth = pool.find(names(PROMPT)[3])
    assert fourth is not None and pool.holders()[fourth] == 1
    second = pool.find(names(PROMPT)[1])
    assert second is not None
    pool.forget([second])
    tiers._removed.clear()
    tiers.corrupt = {names(PROMPT)[1]}
    toy.add("b", PROMPT, max_tokens=8)
    toy.run()
    assert toy.outputs[A] == toy.outputs[B] == reference(PROMPT, 8)
    rows = [row for step in toy.runner.steps for row in step if row.request_id == B]
    assert rows[0].start == 4
    assert fourth not in rows[0].blocks
    toy.assert_idle()


def test_a_stalled_restore_is_given_up_in_time() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.step()
    toy.step()
    assert not toy.engine.has_work
    tiers.restores[-1].left_s = 0.0
    for _ in range(20):
        patience_s = toy.engine.patience_s
        if patience_s is None:
            break
        assert 0 < patience_s < 1
        tiers.pass_time(patience_s + 1e-6)
        assert toy.engine.has_work
        toy.step()
    assert tiers.restores[-1].result is not None, "though it always said that it was nearly there"
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    assert toy.engine.patience_s is None
    toy.assert_idle()


def test_a_restore_that_turns_slow_is_given_up_before_that() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.step()
    tiers.pass_time(0.025)
    tiers.restores[-1].left_s = 0.001
    toy.step()
    assert tiers.restores[-1].result is None, "it is late, but will be there before it were computed"
    tiers.restores[-1].left_s = 10.0
    tiers.pass_time(0.025)
    toy.run()
    assert tiers.restores[-1].result is not None
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)


def test_who_is_aborted_leaves_nothing_behind() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.step()
    toy.engine.abort(A)
    assert tiers.restores[-1].result is not None, "nobody writes into its blocks any more"
    toy.run()
    toy.assert_idle()


def test_a_failed_step_ends_the_restores_of_its_requests() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    tiers.left_s = 0.0
    toy.add("a", PROMPT)
    toy.step()
    tiers.restores[-1].land()
    toy.runner.fail_next = 1
    toy.step()
    assert A in toy.failed
    assert tiers.restores[-1].result is not None
    toy.run()
    toy.assert_idle()


def test_closing_ends_everything() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.step()
    toy.engine.close()
    assert tiers.restores[-1].result is not None and tiers.is_closed


@pytest.mark.parametrize("prefill", [Prefill.HERE, Prefill.ELSEWHERE])
@pytest.mark.parametrize("left", [0, 2])
def test_what_is_dropped_to_make_room_for_itself_is_computed(prefill: Prefill, left: int) -> None:
    toy = tiered()
    tiers = below(toy)
    tiers.blocks_max = len(tiers.rows) + left
    for name in reversed(names(PROMPT)[left:]):  # the first to go
        tiers.rows = {name: tiers.rows.pop(name), **tiers.rows}
    toy.add("a", PROMPT, prefill)
    toy.step()
    assert toy.admitted[A].cached_tokens == 20
    if prefill is Prefill.ELSEWHERE:
        toy.engine.prefill_here(A)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    assert toy.first[A].restored_tokens < 20
    toy.assert_idle()


# ---- preemption


def test_a_preempted_sequence_computes_only_its_tail_again() -> None:
    toy = tiered(blocks=6)
    toy.add("old", range(1, 9), max_tokens=14)
    toy.add("new", range(11, 17), max_tokens=14)
    toy.run()
    assert toy.outputs[RequestId("old")] == reference(range(1, 9), 14)
    assert toy.outputs[RequestId("new")] == reference(range(11, 17), 14)
    stats = toy.engine.stats()
    assert stats.preemptions >= 1
    assert stats.recomputed_tokens < 4 * stats.preemptions, "less than a block each"
    toy.assert_idle()


def test_without_tiers_a_preempted_sequence_computes_more_again() -> None:
    toy = ToyEngine(blocks=6)
    toy.add("old", range(1, 9), max_tokens=14)
    toy.add("new", range(11, 17), max_tokens=14)
    toy.run()
    assert toy.engine.stats().recomputed_tokens >= 4


# ---- a prompt that is computed elsewhere


def reserved(toy: ToyEngine) -> ToyEngine:
    """Request b computes the prompt on another engine; returns that."""
    other = ToyEngine(blocks=24)
    other.add("b", PROMPT, Prefill.ONLY)
    other.run()
    toy.add("a", PROMPT, Prefill.ELSEWHERE)
    toy.step()
    return other


def land(toy: ToyEngine, other: ToyEngine) -> int:
    """What the other computed, of all but the blocks that were found here, with its first token."""
    here, there = toy.admitted[A].blocks, other.admitted[B].blocks
    found = toy.admitted[A].cached_tokens // 4
    toy.region.copy_blocks(other.region, list(zip(here, there, strict=True))[found:])
    return other.outputs[B][0]


def test_the_restore_ends_before_the_commit() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    other = reserved(toy)
    assert toy.admitted[A].cached_tokens == toy.admitted[A].restoring_tokens == 20
    tiers.restores[-1].finish()
    toy.step()
    toy.engine.commit(A, land(toy, other), ())
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    toy.assert_idle()


def test_the_commit_comes_before_the_restore_ends() -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    other = reserved(toy)
    toy.engine.commit(A, land(toy, other), ())
    toy.step()
    assert toy.outputs[A] == reference(PROMPT, 1), "the first token was computed elsewhere, and all of it verified"
    toy.step()
    assert not toy.engine.has_work
    tiers.restores[-1].finish()
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    toy.assert_idle()


@pytest.mark.parametrize("commit_first", [False, True])
@pytest.mark.parametrize("bad", [0, 3])
def test_what_could_not_be_restored_is_computed_here(bad: int, commit_first: bool) -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    tiers.corrupt = {names(PROMPT)[bad]}
    other = reserved(toy)
    if commit_first:
        toy.engine.commit(A, land(toy, other), ())
        toy.step()
        tiers.restores[-1].finish()
    else:
        tiers.restores[-1].finish()
        toy.step()
        toy.engine.commit(A, land(toy, other), ())
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    toy.assert_idle()


@pytest.mark.parametrize("is_corrupt", [False, True])
@pytest.mark.parametrize("ends_first", [False, True])
def test_prefill_here_after_all(is_corrupt: bool, ends_first: bool) -> None:
    toy = tiered()
    tiers = below(toy, at_once=False)
    tiers.corrupt = {names(PROMPT)[2]} if is_corrupt else set()
    reserved(toy)
    if ends_first:
        tiers.restores[-1].finish()
        toy.step()
    toy.engine.prefill_here(A)
    tiers.restores[-1].finish()
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    toy.assert_idle()


def test_an_abandoned_request_is_restored_no_further() -> None:
    toy = tiered(blocks=16)
    tiers = below(toy, at_once=False)
    reserved(toy)
    toy.engine.abandon(A)
    assert tiers.restores[-1].result is not None
    toy.run()
    toy.engine.reclaim(A)
    toy.run()
    toy.assert_idle()


# ---- a prompt that is computed for others


class Sent:
    """What a prefill worker would have sent, as it stood when it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[int, BlocksWritten]] = []

    def __call__(self, layer: int, written: Sequence[BlocksWritten]) -> None:
        self.events += [(layer, event) for event in written]


def sending() -> tuple[ToyEngine, Sent, FakeTiers]:
    sent = Sent()
    toy = tiered(listener=sent)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.step()
    assert toy.admitted[A].restoring_tokens == 20 and toy.admitted[A].digests == ()
    return toy, sent, tiers


def test_restored_blocks_are_told_before_those_that_are_computed() -> None:
    toy, sent, tiers = sending()
    toy.step()
    assert not sent.events
    tiers.restores[-1].finish()
    result = toy.step()
    told = [BlocksWritten(A, 0, 5), BlocksWritten(A, 5, 6)]
    assert sent.events == [(layer, event) for layer in (0, 1) for event in told]
    assert [(part.first, list(part.digests)) for part in result.digested] == [
        (0, toy.region.digests(toy.admitted[A].blocks[:5])),
        (5, toy.region.digests(toy.admitted[A].blocks[5:])),
    ]
    assert toy.outputs[A] == reference(PROMPT, 1)
    assert toy.stored(A, 21) == toy_entries(PROMPT)
    toy.engine.release(A)
    toy.run()
    toy.assert_idle()


def test_a_restore_that_failed_before_it_was_told_costs_nobody_anything() -> None:
    toy, sent, tiers = sending()
    tiers.corrupt = {names(PROMPT)[3]}
    tiers.restores[-1].finish()
    while A not in toy.ended:
        toy.step()
    assert [event for layer, event in sent.events if not layer] == [
        BlocksWritten(A, 0, 3),
        BlocksWritten(A, 3, 5),
        BlocksWritten(A, 5, 6),
    ]
    assert toy.stored(A, 21) == toy_entries(PROMPT), "in the blocks that it was admitted with"
    toy.engine.release(A)
    toy.run()
    toy.assert_idle()


def test_a_restore_that_failed_after_it_was_told_fails_the_request() -> None:
    toy, sent, tiers = sending()
    tiers.corrupt = {names(PROMPT)[3]}
    tiers.restores[-1].left_s = 0.0
    tiers.restores[-1].land()
    result = toy.step()
    assert sent.events and not result.digested
    assert [failed.request_id for failed in result.failed] == [A]
    toy.run()
    toy.assert_idle()


def test_a_failed_restore_before_blocks_that_others_read_fails_the_request() -> None:
    """They cannot be computed again in their place, and others were told of the place."""
    toy = tiered(blocks=24, listener=Sent())
    tiers = below(toy)
    toy.add("b", PROMPT)
    toy.run()
    second = toy.engine._scheduler.pool.find(names(PROMPT)[1])
    assert second is not None
    toy.engine._scheduler.pool.forget([second])
    tiers._removed.clear()
    tiers.corrupt = {names(PROMPT)[1]}
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.run()
    assert A in toy.failed and A not in toy.outputs
    toy.assert_idle()


# ---- for peers, and from peers


# ---- what is told


def test_the_cluster_is_told_of_the_highest_tier() -> None:
    toy = tiered()
    where: dict[BlockHash, str] = {}

    def follow() -> None:
        while toy.engine.has_work:
            changes = toy.step().cache_changes
            for groups in (changes.stored, changes.moved):
                for tier, blocks in groups.items():
                    where.update(dict.fromkeys(blocks, tier))
            for name in changes.removed:
                del where[name]

    toy.add("first", PROMPT)
    follow()
    assert {where[name] for name in names(PROMPT)} == {"hbm"}
    toy.add("filler", [1 + i % 48 for i in range(44)], salt="x", max_tokens=2)
    follow()
    assert {where[name] for name in names(PROMPT)} == {"ddr"}
    tiers_of(toy).blocks_max = 4
    toy.add("a", PROMPT)
    follow()
    tiers = tiers_of(toy)
    assert where == {name: tiers.tier_of(name) for name in tiers.known if tiers.tier_of(name)}


# ---- everything at once


@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_those_of_an_engine_that_computes_everything(seed: int) -> None:
    """A tenth of the working set fits into the pool; restores land, stall and fail as they like."""
    random = Random(seed)
    toy = tiered(blocks=14, limits=Limits(chunk_tokens=random.choice([6, 8, 16]), sequences_max=4, waiting_max=64))
    tiers = tiers_of(toy)
    tiers.at_once, tiers.blocks_max = False, random.choice([20, 1000])
    tiers.copies_down_early = random.random() < 0.5
    prefixes = [tuple(random.randrange(1, 50) for _ in range(random.randrange(8, 33))) for _ in range(12)]
    expected: dict[RequestId, list[int]] = {}
    for number in range(60):
        prompt = (*random.choice(prefixes), *(random.randrange(1, 50) for _ in range(random.randrange(1, 6))))
        tokens = random.randrange(1, 9)
        name = toy.add(f"r{number}", prompt, max_tokens=tokens)
        expected[name] = reference(prompt, tokens)
        _step_at_random(toy, tiers, random, random.randrange(0, 8))
        if random.random() < 0.1:
            toy.engine.abort(name)
            if name not in toy.ended:
                del expected[name]
    for _ in range(3000):
        if len(expected.keys() & toy.ended.keys()) == len(expected):
            break
        _step_at_random(toy, tiers, random, 1)
    assert {name: toy.outputs[name] for name in expected} == expected
    assert len(tiers.restores) > 5
    assert any(restore.result and restore.result.reason for restore in tiers.restores)
    assert any(restore.result and not restore.result.reason for restore in tiers.restores)


def _step_at_random(toy: ToyEngine, tiers: FakeTiers, random: Random, steps: int) -> None:
    for _ in range(steps):
        for restore in tiers.restores:
            if restore.result is None and random.random() < 0.3:
                tiers.corrupt = {random.choice(restore.names)} if random.random() < 0.2 else set()
                restore.finish()
        tiers.pass_time(random.choice([0.0, 0.001, 0.05]))
        if toy.engine.has_work:
            toy.step()
