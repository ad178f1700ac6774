"""How many requests come in a second, of late."""

from math import exp

from baton.clock import Clock

MEMORY_S = 30.0
"""Half of what is counted came in the last 20 s, nearly all in the last 90 s."""


class ArrivalRate:
    """A count that decays with time; over `MEMORY_S` it is a rate. Low at first, while it has seen less than that."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._count, self._as_of_s = 0.0, clock()

    def arrived(self) -> None:
        self._count = self._decayed() + 1

    @property
    def per_s(self) -> float:
        return self._decayed() / MEMORY_S

    def _decayed(self) -> float:
        now_s = self._clock()
        self._count *= exp((self._as_of_s - now_s) / MEMORY_S)
        self._as_of_s = now_s
        return self._count
