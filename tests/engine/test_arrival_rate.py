import pytest

from baton.clock import ManualClock
from engine.worker.arrival_rate import MEMORY_S, ArrivalRate


def arrive(rate: ArrivalRate, clock: ManualClock, per_s: float, seconds: float) -> None:
    for _ in range(round(per_s * seconds)):
        clock.advance(1 / per_s)
        rate.arrived()


@pytest.mark.parametrize("per_s", [0.5, 10.0, 400.0])
def test_a_steady_stream_is_told_as_what_it_is(per_s: float) -> None:
    clock = ManualClock(1000)
    rate = ArrivalRate(clock)
    arrive(rate, clock, per_s, 10 * MEMORY_S)
    assert rate.per_s == pytest.approx(per_s, rel=0.04)


def test_nothing_has_come_yet() -> None:
    clock = ManualClock()
    rate = ArrivalRate(clock)
    clock.advance(100)
    assert rate.per_s == 0


def test_it_follows_a_change_within_a_minute_and_a_half() -> None:
    clock = ManualClock()
    rate = ArrivalRate(clock)
    arrive(rate, clock, 20, 300)
    arrive(rate, clock, 100, 90)
    assert rate.per_s == pytest.approx(100, rel=0.06)


def test_half_of_it_is_forgotten_within_twenty_seconds_however_often_one_asks() -> None:
    clock = ManualClock()
    asked, left_alone = ArrivalRate(clock), ArrivalRate(clock)
    for rate in (asked, left_alone):
        rate.arrived()
    first = asked.per_s
    for _ in range(2000):
        clock.advance(0.01)
        assert asked.per_s <= first
    assert asked.per_s == pytest.approx(left_alone.per_s)
    assert asked.per_s == pytest.approx(first / 2, rel=0.05)
    clock.advance(1e6)
    assert asked.per_s == 0


def test_a_burst_counts_in_full() -> None:
    rate = ArrivalRate(ManualClock())
    for _ in range(300):
        rate.arrived()
    assert rate.per_s == pytest.approx(300 / MEMORY_S)
