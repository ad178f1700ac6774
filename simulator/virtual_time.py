"""Virtual time: events in order, and a clock that jumps from one to the next."""

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class VirtualTime:
    """A baton.clock.Clock. Events of the same instant run in the order in which they were planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._order = count()

    def __call__(self) -> float:
        return self.now_s

    def at(self, time_s: float, action: Action) -> None:
        assert time_s >= self.now_s, "the past cannot be changed"
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now_s + delay_s, action)

    def run(self) -> None:
        """Until nothing is planned any more."""
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
