import pytest

from baton.clock import ManualClock
from baton.latency import StepWork
from engine.interface import StepTiming
from engine.stopwatch import Stopwatch, work_of

CHUNK = StepWork(new_tokens=8, token_context=32.0)
LAST = StepWork(2, 40, 4, 40.0)


def test_a_step_that_is_waited_for_takes_from_its_beginning_to_its_end() -> None:
    clock = ManualClock(5)
    stopwatch = Stopwatch(clock)
    for seconds in (0.5, 2.0):
        stopwatch.begin()
        clock.advance(seconds)
        assert stopwatch.end(CHUNK, is_done=True) == StepTiming(CHUNK, seconds)
        clock.advance(100)


def test_steps_that_nobody_waited_for_count_with_the_next_that_somebody_did() -> None:
    clock = ManualClock()
    stopwatch = Stopwatch(clock)
    for _ in range(2):
        stopwatch.begin()
        clock.advance(0.25)
        assert stopwatch.end(CHUNK, is_done=False) is None
        clock.advance(0.125)
    stopwatch.begin()
    clock.advance(1)
    expected = StepWork(2, 40, 8 + 8 + 4, 32.0 + 32.0 + 40.0, steps=3)
    assert stopwatch.end(LAST, is_done=True) == StepTiming(expected, 2 * 0.25 + 2 * 0.125 + 1)
    stopwatch.begin()
    clock.advance(3)
    assert stopwatch.end(LAST, is_done=True) == StepTiming(LAST, 3)


@pytest.mark.parametrize("ends", [False, True])
def test_what_came_to_nothing_is_forgotten(ends: bool) -> None:
    clock = ManualClock()
    stopwatch = Stopwatch(clock)
    stopwatch.begin()
    if ends:
        stopwatch.end(CHUNK, is_done=False)
    clock.advance(10)
    stopwatch.reset()
    clock.advance(10)
    stopwatch.begin()
    clock.advance(1)
    assert stopwatch.end(LAST, is_done=True) == StepTiming(LAST, 1)


def test_chunks_count_what_each_of_their_tokens_attends_to() -> None:
    work = work_of([(0, 5), (8, 12)])
    one_by_one = sum(position + 0.5 for start, end in ((0, 5), (8, 12)) for position in range(start, end))
    assert work == StepWork(new_tokens=9, token_context=one_by_one)


def test_single_tokens_are_decoding_and_attend_to_themselves_too() -> None:
    assert work_of([(6, 7), (0, 1), (2, 4)]) == StepWork(2, 8, 2, 2 * 3.0)
    assert work_of([]) == StepWork()
