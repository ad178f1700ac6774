"""What is done again and again while Redis answers, and tried on while it does not."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from baton.cluster.redis_client import describe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """How fast the cluster notices."""

    heartbeat_s: float = 1.0
    expiry_s: float = 5.0
    poll_s: float = 0.25
    retry_max_s: float = 1.0
    """The longest wait between two tries while Redis is away."""

    def retry_delay_s(self, failures: int, jitter: float) -> float:
        """Doubles from 0.1 s to `retry_max_s`; `jitter` in [0, 1) keeps workers from coming back in step."""
        return min(self.retry_max_s, 0.1 * 2.0 ** min(failures - 1, 16)) * (0.5 + jitter / 2)


class Repeater:
    """Acts every `period_s` until closed. A failure is logged once, not at every try."""

    def __init__(self, act: Callable[[], Awaitable[None]], period_s: float, lease: Lease, doing: str) -> None:
        self._act, self._period_s, self._lease, self._doing = act, period_s, lease, doing
        self._failures = 0
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_failing(self) -> bool:
        """Whether the last try failed."""
        return self._failures > 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self._doing)

    async def close(self) -> None:
        """Idempotent."""
        self._is_closed = True  # because `cancel` may get lost: Python 3.11's wait_for swallows one now and then
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while not self._is_closed:
            await asyncio.sleep(self._delay_s())
            try:
                await self._act()
            except Exception as error:  # a service loop: whatever it was, the next try may succeed
                self._failed(error)
            else:
                self._succeeded()

    def _delay_s(self) -> float:
        return self._lease.retry_delay_s(self._failures, random.random()) if self._failures else self._period_s

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            log.warning("%s in Redis fails (%s); trying on", self._doing, describe(error))

    def _succeeded(self) -> None:
        if self._failures:
            log.info("%s in Redis works again after %d tries", self._doing, self._failures)
        self._failures = 0
