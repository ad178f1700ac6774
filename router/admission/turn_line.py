"""One model's queue on the asyncio loop: looks at the workers, and tells those who wait when their turn has come."""

import asyncio
import math
from functools import partial
from typing import Protocol

from baton.clock import Clock
from baton.errors import BatonError, DeadlineExceeded, Overloaded, Unavailable
from router.admission.fair_queue import Ask, Waiting
from router.admission.metrics import AdmissionMetrics, RefusalReason
from router.admission.request_class import CLASSES
from router.admission.turn_queue import Refused, TurnQueue

POLL_S = 0.02
"""Between two looks at the workers while requests wait and nobody pokes: predicted queues shrink with time alone."""
NO_WORKER_S_MAX = 10.0
"""For so long those who already wait go on when no worker is left: about what a worker takes to come back."""


class Capacity(Protocol):
    def queue_s(self, model: str) -> float:
        """Predicted wait at the model's least busy workers, with what was placed a moment ago; inf: no worker."""


class TurnLine:
    """Lets requests through while the workers would begin them within `worker_queue_s`.

    Of those that wait, one at a time: the workers are looked at again when the last one has run up to its next await.
    It has placed itself by then, so that it counts.
    """

    def __init__(
        self,
        model: str,
        queue: TurnQueue,
        capacity: Capacity,
        worker_queue_s: float,
        metrics: AdmissionMetrics,
        clock: Clock,
    ) -> None:
        self.queue = queue
        self._model, self._capacity, self._worker_queue_s = model, capacity, worker_queue_s
        self._metrics, self._clock = metrics, clock
        self._turns: dict[Waiting, asyncio.Future[BatonError | None]] = {}
        self._is_poked = False
        self._timer: asyncio.TimerHandle | None = None
        self._no_worker_since_s = math.inf
        self._wait_s = {name: metrics.wait_s(model, name) for name in CLASSES}
        for name in CLASSES:
            metrics.watch_queue(model, name, partial(queue.length, name))

    async def turn(self, ask: Ask) -> None:
        """Returns when the request has its turn; where there is room, at once and without letting other tasks run.

        Raises Unavailable without any worker; Overloaded if the queue is full, others displace it, or its turn would
        not come before its deadline; DeadlineExceeded if it did not after all. Cancelled, it is out of the queue.
        """
        now_s, queue_s = self._clock(), self._capacity.queue_s(self._model)
        if queue_s == math.inf:
            raise self._no_worker(ask)
        if not self.queue and queue_s <= self._worker_queue_s and now_s + queue_s < ask.deadline_s:
            self.queue.start(ask)
            self._wait_s[ask.request_class].observe(0.0)
        else:
            await self._wait(self._join(ask, now_s, queue_s))

    def settle(self, ask: Ask, used_tokens: int) -> None:
        """One that had its turn is over. Once for each; 0: its turn was for nothing."""
        self.queue.settle(ask, used_tokens)
        self.poke()

    def poke(self) -> None:
        """The workers' load may have changed: looks at them before long, if anybody waits."""
        if self.queue and not self._is_poked:
            self._is_poked = True
            asyncio.get_running_loop().call_soon(self._look)

    def close(self) -> None:
        """Sends away all who wait."""
        for waiting in list(self.queue):
            self.queue.leave(waiting)
            self._refuse(waiting, "closed", Unavailable("This router is shutting down; send the request to another."))
        self._set_timer()

    def _join(self, ask: Ask, now_s: float, queue_s: float) -> Waiting:
        joined = self.queue.join(ask, now_s, queue_s)
        if isinstance(joined, Refused):
            self._metrics.refused(joined.reason, ask.tenant)
            raise self._refusal(joined)
        if joined.displaced is not None:
            self._refuse(joined.displaced, "displaced", self._displaced(now_s))
        self._set_timer()
        return joined.waiting

    async def _wait(self, waiting: Waiting) -> None:
        self._turns[waiting] = turn = asyncio.get_running_loop().create_future()
        self.poke()
        try:
            error = await turn
        except asyncio.CancelledError:
            self._turns.pop(waiting, None)
            if not self.queue.leave(waiting) and not turn.cancelled() and turn.result() is None:
                self.settle(waiting.ask, 0)  # it had its turn in the very moment that its client left
            raise
        if error is not None:
            raise error

    def _look(self) -> None:
        self._is_poked = False
        now_s = self._clock()
        for waiting in self.queue.expire(now_s):
            self._refuse(waiting, "expired", DeadlineExceeded("The deadline passed while the request waited in line."))
        if self.queue:
            self._release(now_s, self._capacity.queue_s(self._model))
        self._set_timer()

    def _release(self, now_s: float, queue_s: float) -> None:
        """One, if there is room; nobody ever, if there has been no worker for too long."""
        self._no_worker_since_s = min(self._no_worker_since_s, now_s) if queue_s == math.inf else math.inf
        if now_s - self._no_worker_since_s >= NO_WORKER_S_MAX:
            for waiting in list(self.queue):
                self.queue.leave(waiting)
                self._tell(waiting, self._no_worker(waiting.ask))
        elif queue_s <= self._worker_queue_s:
            released = self.queue.release(now_s)
            assert released is not None
            self._wait_s[released.ask.request_class].observe(now_s - released.since_s)
            if not self._tell(released, None):
                self.queue.settle(released.ask, 0)  # its client has just left
            self.poke()

    def _refuse(self, waiting: Waiting, reason: RefusalReason, error: BatonError) -> None:
        self._metrics.refused(reason, waiting.ask.tenant)
        self._tell(waiting, error)

    def _tell(self, waiting: Waiting, error: BatonError | None) -> bool:
        """What has become of one that waits no more; False if it does not listen any more."""
        turn = self._turns.pop(waiting, None)
        if turn is None or turn.done():
            return False
        turn.set_result(error)
        return True

    def _set_timer(self) -> None:
        """Runs while anybody waits."""
        if self.queue and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(POLL_S, self._tick)
        elif not self.queue and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        self._look()

    def _no_worker(self, ask: Ask) -> Unavailable:
        self._metrics.refused("no_worker", ask.tenant)
        return Unavailable("No decode worker is ready to serve this model now; try again in a while.")

    def _refusal(self, refused: Refused) -> Overloaded:
        if refused.reason == "deadline":
            return Overloaded(
                f"The request would wait {refused.wait_s:.1f} s or so for its turn and miss its deadline; try later.",
                refused.retry_after_s,
            )
        return Overloaded(
            f"{len(self.queue)} requests for this model wait already, as many as may; try again later.",
            refused.retry_after_s,
        )

    def _displaced(self, now_s: float) -> Overloaded:
        return Overloaded(
            "The queue is full, and this request gave way to a more urgent one, or to a tenant's with fewer in line; "
            "try again later.",
            self.queue.retry_after_s(now_s),
        )
