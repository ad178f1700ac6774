"""Time, injected: decisions take a Clock, so that tests and the simulator own it."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a clock that never goes back; only differences mean anything."""

monotonic: Clock = time.monotonic


class ManualClock:
    """A Clock that stands still until told to move."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds
