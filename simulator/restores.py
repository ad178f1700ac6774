"""What the simulated engine sees of the tiers below its pool: restores that end, and how long they hold up a step."""

from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import Protocol

from baton.clock import Clock
from engine.restoring import next_check_s
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Stage
from kvcache.tiers.interface import RestoreTiming
from simulator.sequence import SimulatedSequence
from simulator.tiers.restore import SimulatedRestore


class Below(Protocol):
    """The tiers below the pool."""

    def turn(self) -> None:
        """Between two steps."""

    def take_stall_s(self) -> float:
        """How long copies at once have held up the engine since this was last asked."""

    def restored(self, timings: Sequence[RestoreTiming]) -> None:
        """A restore has ended, and took so long."""


class NothingBelow:
    """Implements Below."""

    def turn(self) -> None: ...

    def take_stall_s(self) -> float:
        return 0.0

    def restored(self, timings: Sequence[RestoreTiming]) -> None: ...


class Restores:
    """Does what engine/settler.py and engine/restoring.py's gate do, in virtual time."""

    def __init__(self, clock: Clock, scheduler: Scheduler, below: Below) -> None:
        self._clock, self._scheduler, self._below = clock, scheduler, below
        self._cache = scheduler.cache

    def settle(self) -> list[SimulatedSequence]:
        """Those that have ended by now, and those that have turned slow, which are given up. Returns sequences that
        cannot go on."""
        broken = []
        if restoring := self._cache.restoring:
            self._cache.give_up_slow(restoring.values())
            for sequence in [sequence for sequence, its in restoring.items() if its.is_over]:
                assert isinstance(sequence, SimulatedSequence)
                if not self._settle(sequence):
                    broken.append(sequence)
        return broken

    def _settle(self, sequence: SimulatedSequence) -> bool:
        assert sequence.restoring is not None
        restore = sequence.restoring.restore
        restored = restore.result
        assert restored is not None
        if isinstance(restore, SimulatedRestore) and not sequence.preemptions:
            sequence.restored = Counter(restore.tiers[: restored.good])
        self._below.restored(restored.timings)
        return self._scheduler.settle(sequence)

    @property
    def may_join(self) -> bool:
        """Somebody waits until its restore will keep ahead, or takes part in this step already."""
        return any(sequence.stage is Stage.RUNNING for sequence in self._cache.restoring)

    @property
    def check_s(self) -> float | None:
        """By the clock, when to see whether a restore has turned slow."""
        return next_check_s([*self._cache.restoring.values()])

    def landed_s(self, chunks: Sequence[Chunk]) -> float:
        """When all that these restore has landed; -inf if it has."""
        late = [its.restore for chunk in chunks if (its := chunk.sequence.restoring) is not None and not its.is_over]
        return max((restore.lands_s for restore in late if isinstance(restore, SimulatedRestore)), default=-inf)
