"""How often to look whether something has come to an end: at once at first, then ever more rarely."""

from baton.clock import Clock

SPIN_S = 50e-6
"""For so long after something happened, looking again at once is cheaper than to sleep."""
SLEEP_S = 100e-6
ATTENDING_SLEEP_S = 1e-3
"""For who is read from: on most links it has nothing to do after the first contact, and it competes with who reads."""
STALLED_S = 5.0
"""After so long without anything happening, the peer has stopped."""
STALLED_SLEEP_S = 10e-3
IDLE_SLEEP_S = 1.0
"""With nothing to wait for: so that the connections of peers that are gone are taken down."""


class Pace:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._happened_s = clock()

    def happened(self) -> None:
        self._happened_s = self._clock()

    def sleep_s(self, is_reading: bool, is_attending: bool) -> float:
        """Until the next look; whatever wakes the sleeper earlier is fine."""
        if not is_reading and not is_attending:
            return IDLE_SLEEP_S
        quiet_s = self._clock() - self._happened_s
        if is_reading and quiet_s < SPIN_S:
            return 0.0
        if quiet_s > STALLED_S:
            return STALLED_SLEEP_S
        return SLEEP_S if is_reading else min(max(SLEEP_S, quiet_s / 4), ATTENDING_SLEEP_S)
