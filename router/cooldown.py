"""Which workers are left alone for a while because they failed. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from baton.clock import Clock
from baton.ids import WorkerId

FIRST_S, LONGEST_S = 1.0, 60.0
"""A worker's first cool-down, and what it doubles up to."""
FORGET_S = 10 * LONGEST_S
"""A worker that has not failed for so long after its cool-down is as good as any other."""


@dataclass(frozen=True, slots=True)
class _Failure:
    failed_s: float
    cooldown_s: float

    @property
    def until_s(self) -> float:
        return self.failed_s + self.cooldown_s


class Cooldowns:
    """By worker id, so that one that crashes again and again is known under its next life too.

    Bounded by the workers that failed within the last FORGET_S or so.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: dict[WorkerId, _Failure] = {}

    def failed(self, worker_id: WorkerId, since_s: float, *, is_overloaded: bool = False) -> None:
        """It failed something that was begun at `since_s`. What was begun before the failure that is known already
        says nothing new: the twenty streams that a dying worker breaks are one failure. One that is merely overloaded
        has a first cool-down each time."""
        last = self._failures.get(worker_id)
        if last is not None and since_s < last.failed_s:
            return
        self._forget_old()
        cooldown_s = FIRST_S if last is None or is_overloaded else min(2 * last.cooldown_s, LONGEST_S)
        self._failures[worker_id] = _Failure(self._clock(), cooldown_s)

    def succeeded(self, worker_id: WorkerId, since_s: float) -> None:
        """It finished what was begun at `since_s`; if that was after its last failure, all is forgiven."""
        last = self._failures.get(worker_id)
        if last is not None and since_s >= last.failed_s:
            del self._failures[worker_id]

    def remaining_s(self, worker_id: WorkerId) -> float:
        """0 when it is not cooling down."""
        last = self._failures.get(worker_id)
        return 0.0 if last is None else max(last.until_s - self._clock(), 0.0)

    def cooling(self) -> dict[WorkerId, float]:
        """How long each that is cooling down has left."""
        left = {worker_id: self.remaining_s(worker_id) for worker_id in self._failures}
        return {worker_id: seconds for worker_id, seconds in left.items() if seconds}

    def excluded(self, decode: Iterable[WorkerId], prefill: Iterable[WorkerId]) -> dict[WorkerId, str]:
        """Of these workers, those to leave alone, and why. Never all that decode: then the one that is nearest to
        the end of its cool-down is spared. Prompts can do without any that only prefills."""
        if not self._failures:
            return {}
        cooling, decode = self.cooling(), tuple(decode)
        left_alone = {worker_id: cooling[worker_id] for worker_id in (*decode, *prefill) if worker_id in cooling}
        if decode and all(worker_id in left_alone for worker_id in decode):
            del left_alone[min(decode, key=lambda worker_id: left_alone[worker_id])]
        return {worker_id: f"cooling down after a failure, {left:.1f} s left" for worker_id, left in left_alone.items()}

    def _forget_old(self) -> None:
        now_s = self._clock()
        old = [worker_id for worker_id, last in self._failures.items() if now_s > last.until_s + FORGET_S]
        for worker_id in old:
            del self._failures[worker_id]
