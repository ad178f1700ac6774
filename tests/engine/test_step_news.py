"""What a step says about the worker: how long it took for what, and what became of the prefix cache."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from baton.clock import ManualClock
from baton.cluster.cache_events import CacheChanges
from baton.ids import BlockHash, RequestId
from baton.latency import StepWork
from engine.batch import Row
from engine.interface import Prefill, StepResult, StepTiming
from engine.scheduler import Limits
from engine.sequence import LiveSequence, Stage
from engine.thread import EngineThread
from kvcache.block_hash import BlockHasher, root_hash

STEP_S = 0.25
LIMITS = Limits(chunk_tokens=8, sequences_max=8, waiting_max=64)


def timed_engine(**settings: Any) -> tuple[ToyEngine, ManualClock]:
    """Each step of it takes STEP_S, whether it fails or not."""
    clock = ManualClock(100)
    toy = ToyEngine(clock=clock, **settings)
    forward = toy.runner.forward

    def slow_forward(rows: Sequence[Row], on_layer: Callable[[int], None] | None) -> Any:
        clock.advance(STEP_S)
        return forward(rows, on_layer)

    toy.runner.forward = slow_forward  # type: ignore[method-assign]
    return toy, clock


def names(toy: ToyEngine, tokens: Sequence[int]) -> tuple[BlockHash, ...]:
    hasher = BlockHasher(root_hash(toy.model.fingerprint, toy.block_tokens, "float32"), toy.block_tokens)
    hasher.extend(tokens)
    return tuple(hasher.hashes)


def inventory(toy: ToyEngine) -> set[BlockHash]:
    return set(toy.engine._scheduler.pool._by_name)


# ---- timing


def test_a_step_says_what_it_computed_and_how_long_it_took() -> None:
    toy, clock = timed_engine()
    toy.add("long", range(1, 13), max_tokens=3)
    told = []
    while toy.engine.has_work:
        clock.advance(10)  # between two steps the engine does nothing
        told.append(toy.step().timing)
    assert told == [
        None,
        StepTiming(StepWork(new_tokens=8, token_context=8 * 4.0), STEP_S),
        StepTiming(StepWork(new_tokens=4, token_context=4 * 10.0), STEP_S),
        StepTiming(StepWork(sequences=1, kv_tokens=13), STEP_S),
        StepTiming(StepWork(sequences=1, kv_tokens=14), STEP_S),
    ]


def test_a_step_of_both_kinds_tells_them_apart() -> None:
    toy, _ = timed_engine()
    toy.add("a", range(1, 5), max_tokens=8)
    toy.step()
    toy.step()
    toy.add("b", range(11, 17))
    toy.step()
    timing = toy.step().timing
    assert timing is not None
    assert timing.work == StepWork(1, 5, 6, 6 * 3.0)


def test_what_the_prefix_cache_holds_is_not_computed_but_attended_to() -> None:
    toy, _ = timed_engine()
    toy.add("first", range(1, 9), max_tokens=1)
    toy.run()
    toy.add("second", range(1, 14), max_tokens=1)
    toy.step()
    assert toy.step().timing == StepTiming(StepWork(new_tokens=5, token_context=5 * (8 + 2.5)), STEP_S)


def test_a_step_that_fails_tells_no_time_and_costs_the_next_none() -> None:
    toy, _ = timed_engine()
    toy.add("a", range(1, 9))
    toy.step()
    toy.runner.fail_next = 1
    failed = toy.step()
    assert failed.failed and failed.timing is None and not failed.cache_changes
    toy.add("b", range(1, 9), max_tokens=1)
    toy.step()
    assert toy.step().timing == StepTiming(StepWork(new_tokens=8, token_context=32.0), STEP_S)


def test_a_device_is_waited_for_at_the_end_of_a_prompt_only() -> None:
    toy, clock = timed_engine(blocks=32)
    toy.region.is_host = False
    toy.add("a", range(1, 21), max_tokens=2)
    told = []
    while toy.engine.has_work:
        told.append(toy.step().timing)
        clock.advance(0.125)
    whole_prompt = StepWork(new_tokens=20, token_context=20 * 10.0, steps=3)
    decode = StepWork(sequences=1, kv_tokens=21)
    assert told == [
        None,
        None,
        None,
        StepTiming(whole_prompt, 3 * STEP_S + 2 * 0.125),
        StepTiming(decode, STEP_S),
    ]


def test_a_prompt_that_is_aborted_on_a_device_costs_the_next_no_time() -> None:
    toy, clock = timed_engine(blocks=32)
    toy.region.is_host = False
    gone = toy.add("gone", range(1, 21))
    toy.step()
    toy.step()
    toy.engine.abort(gone)
    clock.advance(1000)
    toy.add("b", range(30, 36), max_tokens=1)
    toy.step()
    assert toy.step().timing == StepTiming(StepWork(new_tokens=6, token_context=18.0), STEP_S)


# ---- the prefix cache


def test_blocks_are_stored_as_they_fill_and_under_the_names_that_anybody_gives_them() -> None:
    toy, _ = timed_engine()
    request = toy.add("a", range(1, 13), max_tokens=6)
    changes = []
    while toy.engine.has_work:
        changes.append(toy.step().cache_changes)
    tokens = [*range(1, 13), *toy.outputs[request]]
    first, second, third, fourth = names(toy, tokens[:-1])
    assert changes[:3] == [CacheChanges(), CacheChanges({"hbm": (first, second)}), CacheChanges({"hbm": (third,)})]
    assert [each for each in changes[3:] if each] == [CacheChanges({"hbm": (fourth,)})]


def test_a_committed_prompt_is_stored_with_its_first_token() -> None:
    toy, _ = timed_engine()
    request = toy.add("a", range(1, 10), Prefill.ELSEWHERE)
    assert not toy.step().cache_changes
    toy.engine.commit(request, 5, ())
    told = toy.step()
    assert told.generated[0].token_ids == (5,)
    assert told.cache_changes == CacheChanges({"hbm": names(toy, range(1, 10))})


def test_what_is_evicted_for_a_prompt_is_removed_when_that_is_admitted() -> None:
    toy, _ = timed_engine(blocks=4)
    toy.add("old", range(1, 13), max_tokens=1)
    toy.run()
    old = names(toy, range(1, 13))
    toy.add("new", range(21, 36), max_tokens=1)
    admitted = toy.step()
    assert admitted.admitted
    assert set(admitted.cache_changes.removed) == set(old) and not admitted.cache_changes.stored


def test_without_a_prefix_cache_nothing_is_told() -> None:
    toy, _ = timed_engine(limits=Limits(8, 8, 64, prefix_cache=False))
    toy.add("a", range(1, 13))
    while toy.engine.has_work:
        assert not toy.step().cache_changes


PREFILLS = (Prefill.HERE, Prefill.HERE, Prefill.ONLY, Prefill.ELSEWHERE)
moves = st.lists(
    st.tuples(st.sampled_from(["add", "add", *["step"] * 8, "settle", "abort"]), st.integers(0, 999)),
    min_size=40,
    max_size=80,
)


def prompt_of(number: int) -> list[int]:
    """Of 3 to 20 tokens; some start alike."""
    length = 3 + number % 18
    return [(number % 4 * 11 + position) % 50 for position in range(length)]


def live(toy: ToyEngine, *stages: Stage) -> list[LiveSequence]:
    return [sequence for sequence in toy.engine._sequences.values() if sequence.stage in stages]


def settle(toy: ToyEngine, number: int) -> None:
    """What the other worker's answer does."""
    for sequence in live(toy, Stage.HELD):
        toy.engine.release(sequence.request_id)
    for sequence in live(toy, Stage.RESERVED):
        if sequence.request_id in toy.engine._commits:
            continue
        if number % 2:
            toy.engine.commit(sequence.request_id, number % 50, ())
        else:
            toy.engine.prefill_here(sequence.request_id)


def make(toy: ToyEngine, move: str, number: int, count: int) -> StepResult:
    if move == "add":
        toy.add(f"r{count}", prompt_of(number), PREFILLS[number % len(PREFILLS)], max_tokens=1 + number % 9)
    elif move == "settle":
        settle(toy, number)
    elif move == "abort" and (sequences := live(toy, *Stage)):
        toy.engine.abort(sequences[number % len(sequences)].request_id)
    elif move == "step":
        return toy.step()
    return StepResult()


@settings(max_examples=150, deadline=None)
@given(moves=moves, blocks=st.integers(6, 14), chunk_tokens=st.sampled_from([3, 8, 64]))
def test_what_was_told_is_what_the_pool_holds_at_any_time(
    moves: list[tuple[str, int]], blocks: int, chunk_tokens: int
) -> None:
    toy = ToyEngine(blocks=blocks, limits=Limits(chunk_tokens, 8, 64))
    told = set[BlockHash]()
    for count, (move, number) in enumerate(moves):
        changes = make(toy, move, number, count).cache_changes
        for stored in changes.stored.values():
            assert told.isdisjoint(stored)
            told.update(stored)
        assert told.issuperset(changes.removed)
        told.difference_update(changes.removed)
        assert told == inventory(toy)


@settings(max_examples=100, deadline=None)
@given(moves=moves, blocks=st.integers(6, 14), chunk_tokens=st.sampled_from([3, 8, 64]))
def test_every_step_that_computed_is_timed_and_no_other(
    moves: list[tuple[str, int]], blocks: int, chunk_tokens: int
) -> None:
    toy, _ = timed_engine(blocks=blocks, limits=Limits(chunk_tokens, 8, 64))
    for count, (move, number) in enumerate(moves):
        steps = len(toy.runner.steps)
        timing = make(toy, move, number, count).timing
        if len(toy.runner.steps) == steps:
            assert timing is None
            continue
        assert timing is not None and timing.duration_s == STEP_S
        rows = toy.runner.steps[-1]
        positions = [range(row.start, row.start + len(row.token_ids)) for row in rows]
        assert timing.work.sequences == sum(len(row.token_ids) == 1 for row in rows)
        assert timing.work.kv_tokens == sum(each.stop for each in positions if len(each) == 1)
        assert timing.work.new_tokens == sum(len(each) for each in positions if len(each) > 1)
        assert timing.work.token_context == sum(p + 0.5 for each in positions if len(each) > 1 for p in each)


# ---- on the loop


def hear(toy: ToyEngine, prompt: Sequence[int], until: Callable[[StepResult], bool]) -> list[StepResult]:
    """What the loop is told of one request."""

    async def main() -> list[StepResult]:
        results: list[StepResult] = []
        is_over = asyncio.Event()

        def take(result: StepResult) -> None:
            results.append(result)
            if until(result):
                is_over.set()

        owner = EngineThread(lambda: toy.engine, take, asyncio.get_running_loop())
        try:
            await owner.started()
            await owner.call(lambda _: toy.add("a", prompt, max_tokens=1))
            async with asyncio.timeout(30):
                await is_over.wait()
        finally:
            await owner.stop()
        return results

    return asyncio.run(main())


def test_the_loop_hears_of_a_step_that_says_only_how_long_it_took() -> None:
    toy, _ = timed_engine(limits=Limits(3, 8, 64))
    results = hear(toy, range(1, 9), lambda result: bool(result.generated))
    timing = StepTiming(StepWork(new_tokens=3, token_context=4.5), STEP_S)
    assert StepResult(timing=timing) in results


def test_the_loop_hears_of_a_step_that_says_only_what_became_of_the_cache() -> None:
    toy, _ = timed_engine()
    toy.region.is_host = False
    results = hear(toy, range(1, 13), lambda result: bool(result.generated))
    assert StepResult(cache_changes=CacheChanges({"hbm": names(toy, range(1, 9))})) in results


def test_a_result_that_says_nothing_is_none() -> None:
    assert not StepResult()


# ---- how much there is to do


def test_what_waits_is_what_its_steps_will_compute() -> None:
    toy, _ = timed_engine(blocks=32)
    for number, length in enumerate((12, 8, 20)):
        toy.add(f"r{number}", [(17 * number + i) % 50 for i in range(length)], max_tokens=1)
    computed = StepWork(steps=0)
    totals = set()
    while True:
        stats = toy.engine.stats()
        totals.add((stats.waiting_tokens + computed.new_tokens, stats.waiting_token_context + computed.token_context))
        if not toy.engine.has_work:
            break
        if timing := toy.step().timing:
            computed += timing.work
    assert totals == {(40, 12 * 6.0 + 8 * 4.0 + 20 * 10.0)}


@settings(max_examples=150, deadline=None)
@given(moves=moves, blocks=st.integers(6, 14), chunk_tokens=st.sampled_from([3, 8, 64]))
def test_waiting_tokens_and_their_contexts_are_direct_sums(
    moves: list[tuple[str, int]], blocks: int, chunk_tokens: int
) -> None:
    toy = ToyEngine(blocks=blocks, limits=Limits(chunk_tokens, 8, 64))
    for count, (move, number) in enumerate(moves):
        make(toy, move, number, count)
        waiting = [s for s in live(toy, Stage.WAITING, Stage.RUNNING) if s.prefill is not Prefill.ELSEWHERE]
        to_compute = [range(s.computed, len(s.tokens)) for s in waiting]
        to_compute = [
            positions
            for positions, sequence in zip(to_compute, waiting, strict=True)
            if len(positions) > 1 or sequence.stage is Stage.WAITING
        ]
        stats = toy.engine.stats()
        assert stats.waiting_tokens == sum(map(len, to_compute))
        assert stats.waiting_token_context == sum(p + 0.5 for positions in to_compute for p in positions)


def test_kv_tokens_are_what_the_next_step_finds() -> None:
    toy = ToyEngine(blocks=32)
    toy.add("a", range(1, 5), max_tokens=6)
    toy.add("b", range(11, 21), max_tokens=6)
    toy.add("waits", range(31, 40), Prefill.ELSEWHERE)
    kv_tokens = []
    while toy.engine.has_work:
        before, steps = toy.engine.stats(), len(toy.runner.steps)
        toy.step()
        if len(toy.runner.steps) > steps and before.running_sequences == len(toy.runner.steps[-1]):
            assert before.kv_tokens == sum(row.start for row in toy.runner.steps[-1])
            kv_tokens.append(before.kv_tokens)
    assert kv_tokens[-1] > 10 and len(set(kv_tokens)) > 5
    assert toy.engine.stats().kv_tokens == 0


def test_a_prompt_that_was_committed_counts_in_full() -> None:
    toy = ToyEngine()
    request = toy.add("a", range(1, 10), Prefill.ELSEWHERE, max_tokens=9)
    toy.step()
    assert toy.engine.stats().kv_tokens == 0
    toy.engine.commit(request, 5, ())
    toy.step()
    assert toy.engine.stats().kv_tokens == 9
    toy.step()
    assert toy.engine.stats().kv_tokens == 10
    toy.engine.abort(RequestId("a"))
    assert toy.engine.stats().kv_tokens == 0


@pytest.mark.parametrize("prefill", [Prefill.HERE, Prefill.ONLY])
def test_what_is_held_for_sending_is_attended_to_by_nobody(prefill: Prefill) -> None:
    toy = ToyEngine()
    toy.add("a", range(1, 10), prefill, max_tokens=1)
    toy.run()
    assert toy.engine.stats().kv_tokens == 0
