from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import make_model, random_prompt
from toy_engine import ToyEngine, toy_reference

from baton.clock import ManualClock
from baton.cluster.cache_events import CacheChanges
from baton.ids import BlockId, RequestId
from baton.latency import DEFAULT_LATENCY, DecodeCost, PrefillCost, StepWork
from baton.latency_fit import LatencyFit
from baton.layout import PROBE_BLOCKS, KVLayout
from baton.sampling import SamplingParams
from baton.settings import WorkerSettings
from engine.batch import Row
from engine.interface import Prefill, StepTiming
from engine.model.loader import load_model
from engine.opening import open_engine
from engine.scheduler import Limits
from engine.self_test import ROUNDS, SECONDS_MAX, StepShape, measure_steps, step_shapes
from engine.stopwatch import work_of

LAYOUT = KVLayout(layers=2, blocks=1000, block_tokens=32, kv_heads=1, head_dim=1, dtype="float32")
SHAPES = [StepShape(1, 2, 0), StepShape(1, 1, 0), StepShape(1, 8, 0), StepShape(4, 1, 16)]


def work_of_shape(shape: StepShape) -> StepWork:
    return work_of([(shape.context, shape.context + shape.new)] * shape.sequences)


# ---- which steps


@given(st.data())
def test_every_step_fits_into_the_pool_the_context_and_the_batch(data: st.DataObject) -> None:
    pool, block_tokens = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 64))
    layout = replace(LAYOUT, blocks=pool + PROBE_BLOCKS, block_tokens=block_tokens)
    assume(pool * block_tokens >= 2)
    context_length = data.draw(st.integers(2, pool * block_tokens))
    chunk_tokens, sequences_max = data.draw(st.integers(1, 4096)), data.draw(st.integers(1, 512))
    shapes = step_shapes(layout, context_length, chunk_tokens, sequences_max)
    for shape in shapes:
        length = shape.context + shape.new
        assert shape.context >= 0
        assert length <= context_length
        assert shape.sequences * layout.blocks_for(length) <= pool
        assert 1 <= shape.sequences <= sequences_max
        assert shape.new <= max(2, chunk_tokens)
    assert {shape.new > 1 for shape in shapes} == {False, True}, "both kinds"
    assert len(set(shapes)) == len(shapes)


def test_small_steps_come_first_and_both_kinds_in_turns() -> None:
    shapes = step_shapes(LAYOUT, 8192, 512, 256)
    assert [shape.new for shape in shapes[::2]] == [32, 128, 512, 512]
    assert [(shape.sequences, shape.new) for shape in shapes[1::2]] == [(1, 1), (32, 1), (8, 1), (32, 1)]
    works = list(map(work_of_shape, shapes))
    assert len({work.token_context for work in works[::2]}) == 4
    assert len({(work.sequences, work.kv_tokens) for work in works[1::2]}) == 4


@pytest.mark.parametrize("factor", [0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0])
def test_these_steps_tell_the_coefficients_apart(factor: float) -> None:
    worker = replace(
        DEFAULT_LATENCY,
        prefill=PrefillCost(0.004 * factor, 5e-5 * factor, 2e-8 * factor),
        decode=DecodeCost(0.006 * factor, 3e-4 * factor, 2e-7 * factor),
    )
    works = [work_of_shape(shape) for shape in step_shapes(LAYOUT, 8192, 512, 256)]
    fit = LatencyFit.of([(work, worker.step_time_s(work)) for work in works * (ROUNDS - 1)])
    for work in (*works, StepWork(16, 4000), StepWork(new_tokens=256, token_context=256 * 640.0)):
        assert fit.latency.step_time_s(work) == pytest.approx(worker.step_time_s(work), rel=0.2)


# ---- how long it takes


def measured(step_s: float, shapes: Sequence[StepShape] = SHAPES) -> tuple[tuple[StepTiming, ...], float]:
    """What is measured where each step takes so long, and how long it took altogether."""
    clock = ManualClock(50)

    def measure(rows: Sequence[Row]) -> StepTiming:
        clock.advance(step_s)
        spans = [(row.start, row.start + len(row.token_ids)) for row in rows]
        return StepTiming(work_of(spans), clock.now_s)

    blocks = [BlockId(block) for block in range(100)]
    timings = measure_steps(shapes, blocks, LAYOUT, 50, measure, clock)
    return timings, clock.now_s - 50


def test_the_first_round_only_warms_up() -> None:
    timings, took_s = measured(step_s=0.001)
    assert took_s == pytest.approx(ROUNDS * len(SHAPES) * 0.001)
    assert [timing.work for timing in timings] == [work_of_shape(shape) for shape in SHAPES] * (ROUNDS - 1)


@pytest.mark.parametrize(
    ("step_s", "steps", "kept"),
    [
        (1000.0, 1, SHAPES[:1]),
        (SECONDS_MAX / 3, 3, SHAPES[:3]),
        (SECONDS_MAX / 4, 4, SHAPES),
        (SECONDS_MAX / 6, 6, [*SHAPES[2:], *SHAPES[:2]]),
    ],
)
def test_no_step_begins_after_its_time(step_s: float, steps: int, kept: list[StepShape]) -> None:
    """A step counts from the first round only where there was no time for it a second time."""
    timings, took_s = measured(step_s * 1.0001)
    assert took_s == pytest.approx(steps * step_s, rel=0.001)
    assert [timing.work for timing in timings] == [work_of_shape(shape) for shape in kept]


def test_sequences_of_a_step_share_no_block() -> None:
    tables: list[list[BlockId]] = []

    def measure(rows: Sequence[Row]) -> StepTiming:
        tables.append([block for row in rows for block in row.blocks])
        assert all(len(row.blocks) == LAYOUT.blocks_for(row.start + len(row.token_ids)) for row in rows)
        assert all(0 <= token < 50 for row in rows for token in row.token_ids)
        return StepTiming(StepWork(), 1.0)

    measure_steps([StepShape(5, 1, 70)], [BlockId(block) for block in range(20)], LAYOUT, 50, measure, ManualClock())
    assert tables and all(len(set(table)) == len(table) == 15 for table in tables)


# ---- on an engine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return load_model(str(make_model("llama", tmp_path_factory.mktemp("llama"))), device="cpu", dtype="float32")


@pytest.fixture
def engine(tiny: Any) -> Iterator[Callable[[], EngineDriver]]:
    drivers: list[EngineDriver] = []

    def make() -> EngineDriver:
        drivers.append(EngineDriver(open_engine(tiny, WorkerSettings(kv_blocks=64, block_tokens=8))))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.assert_idle()
        driver.engine.close()


def test_an_engine_is_after_it_as_it_was_before(engine: Callable[[], EngineDriver]) -> None:
    tested, fresh = engine(), engine()
    timings = tested.engine.self_test()
    assert tested.engine.stats() == fresh.engine.stats()
    assert {bool(timing.work.new_tokens) for timing in timings} == {False, True}
    assert all(timing.duration_s > 0 for timing in timings)
    assert cache_changes(tested) == cache_changes(fresh)
    assert tested.outputs == fresh.outputs


def cache_changes(driver: EngineDriver) -> list[CacheChanges]:
    """All that two requests, and the step before them, tell."""
    changes = [driver.step().cache_changes]
    for number, length in enumerate((100, 37)):
        driver.add(f"r{number}", random_prompt(length, seed=length), logprobs=0)
    while driver.engine.has_work:
        changes.append(driver.step().cache_changes)
    return [each for each in changes if each]


def test_it_takes_no_longer_than_it_may_and_tells_no_listener() -> None:
    clock, heard = ManualClock(), list[int]()
    toy = ToyEngine(clock=clock, listener=lambda layer, _: heard.append(layer))
    forward = toy.runner.forward

    def slow_forward(*arguments: Any) -> Any:
        clock.advance(SECONDS_MAX * 0.4)
        return forward(*arguments)

    toy.runner.forward = slow_forward  # type: ignore[method-assign]
    timings = toy.engine.self_test()
    assert len(toy.runner.steps) == len(timings) == 3
    assert [timing.duration_s for timing in timings] == pytest.approx([SECONDS_MAX * 0.4] * 3)
    assert not heard
    toy.assert_idle()


@pytest.mark.parametrize(
    ("blocks", "block_tokens", "limits"),
    [(2, 1, Limits(1, 1, 1)), (16, 4, Limits(1, 8, 8)), (3, 64, Limits(8192, 256, 8)), (40, 1, Limits(64, 2, 8))],
)
def test_it_runs_on_pools_and_limits_of_any_shape(blocks: int, block_tokens: int, limits: Limits) -> None:
    toy = ToyEngine(blocks=blocks, block_tokens=block_tokens, limits=limits, clock=ManualClock())
    shapes = step_shapes(toy.model.layout, toy.model.context_length, limits.chunk_tokens, limits.sequences_max)
    assert len(toy.engine.self_test()) == (ROUNDS - 1) * len(shapes)
    toy.assert_idle()


@pytest.mark.parametrize("steps_before", [0, 3])
def test_one_that_fails_leaves_an_engine_that_serves(steps_before: int) -> None:
    toy = ToyEngine()
    forward = toy.runner.forward

    def fail_later(*arguments: Any) -> Any:
        toy.runner.fail_next = int(len(toy.runner.steps) == steps_before)
        return forward(*arguments)

    toy.runner.forward = fail_later  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        toy.engine.self_test()
    toy.assert_idle()
    toy.runner.forward = forward  # type: ignore[method-assign]
    request = toy.add("a", range(1, 12), Prefill.HERE)
    toy.run()
    expected = toy_reference(range(1, 12), SamplingParams(max_tokens=4, ignore_eos=True), toy.model.context_length)
    assert toy.outputs[RequestId(request)] == expected
