"""Waiting for one's turn at the router, in virtual time: the real queue, looked at as admission's turn_line.py does."""

from collections.abc import Callable
from dataclasses import dataclass

from router.admission.fair_queue import Ask, Waiting
from router.admission.turn_line import POLL_S
from router.admission.turn_queue import Refused, TurnQueue
from simulator.job import Job
from simulator.virtual_time import VirtualTime

QUEUE_MAX = 1024
"""As RouterSettings.queue_max."""
TENANT = "default"


@dataclass(frozen=True, slots=True)
class Admission:
    """How requests are admitted; all are of one tenant and the class standard."""

    worker_queue_s: float = 1.0
    """As RouterSettings.worker_queue_s."""
    deadline_s: float = 3600.0
    """From a request's arrival: when a worker must have begun with it."""


class SimulatedLine:
    """Requests go on by `go` when they have their turn, or are sent away by `refuse`."""

    def __init__(
        self,
        time: VirtualTime,
        admission: Admission,
        queue_s: Callable[[], float],
        go: Callable[[Job], None],
        refuse: Callable[[Job, str], None],
    ) -> None:
        """`queue_s`: predicted wait at the least busy workers."""
        self.queue = TurnQueue(QUEUE_MAX)
        self._time, self._admission, self._queue_s = time, admission, queue_s
        self._go, self._refuse = go, refuse
        self._jobs: dict[Waiting, Job] = {}
        self._asks: dict[int, Ask] = {}
        self._polls = False

    def arrive(self, job: Job, expected_tokens: int) -> None:
        now_s, queue_s = self._time.now_s, self._queue_s()
        deadline_s = job.request.arrival_s + self._admission.deadline_s
        ask = Ask(TENANT, 1.0, "standard", job.request.prompt_tokens + expected_tokens, deadline_s)
        if not self.queue and queue_s <= self._admission.worker_queue_s and now_s + queue_s < deadline_s:
            self.queue.start(ask)
            self._has_turn(job, ask)
            return
        joined = self.queue.join(ask, now_s, queue_s)
        if isinstance(joined, Refused):
            self._refuse(job, joined.reason)
            return
        if joined.displaced is not None:
            self._refuse(self._jobs.pop(joined.displaced), "displaced")
        self._jobs[joined.waiting] = job
        self._poll()

    def finished(self, job: Job) -> None:
        if ask := self._asks.pop(job.number, None):
            self.queue.settle(ask, job.request.prompt_tokens + job.request.output_tokens)
            self._look()

    def _has_turn(self, job: Job, ask: Ask) -> None:
        self._asks[job.number] = ask
        self._go(job)

    def _poll(self) -> None:
        if self.queue and not self._polls:
            self._polls = True
            self._time.after(POLL_S, self._tick)

    def _tick(self) -> None:
        self._polls = False
        self._look()

    def _look(self) -> None:
        """Each that has its turn is placed at once, so that it counts for the next."""
        for waiting in self.queue.expire(self._time.now_s):
            self._refuse(self._jobs.pop(waiting), "expired")
        while self.queue and self._queue_s() <= self._admission.worker_queue_s:
            released = self.queue.release(self._time.now_s)
            assert released is not None
            self._has_turn(self._jobs.pop(released), released.ask)
        self._poll()
