"""A loop that writes to Redis whenever there is news, one write at a time, and tries on while Redis is away."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable

from baton.cluster.lease import Lease
from baton.cluster.redis_client import describe

log = logging.getLogger(__name__)

LINGER_S = 0.02
"""Between two writes at least, so that what happens meanwhile goes as one."""


class RedisWriter:
    """Calls `write` after each `wake`, and every `heartbeat_s` without one. A failure is logged once, not at every try.

    `write` says whether more waits than it could write; what it raises is taken for Redis being away.
    """

    def __init__(self, write: Callable[[], Awaitable[bool]], lease: Lease, doing: str) -> None:
        self._write, self._lease, self._doing = write, lease, doing
        self._news = asyncio.Event()
        self._failures = 0
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Returns at once; call it on the loop."""
        self._news.set()

    def start(self, heartbeat_s: float | None = None) -> None:
        self._task = asyncio.create_task(self._run(heartbeat_s), name=self._doing)

    async def close(self) -> None:
        """Idempotent. What is not written yet stays so."""
        self._is_closed = True  # because a cancellation may get lost in Redis's client
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self, heartbeat_s: float | None) -> None:
        while not self._is_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(heartbeat_s):
                    await self._news.wait()
            await asyncio.sleep(await self._write_once())

    async def _write_once(self) -> float:
        """How long to wait before the next."""
        self._news.clear()
        try:
            more_waits = await self._write()
        except Exception as error:  # a service loop: whatever it was, the next try may succeed
            self._news.set()
            self._failures += 1
            if self._failures == 1:
                log.warning("%s in Redis fails (%s); trying on", self._doing, describe(error))
            return self._lease.retry_delay_s(self._failures, random.random())
        if more_waits:
            self._news.set()
        if self._failures:
            log.info("%s in Redis works again after %d tries", self._doing, self._failures)
        self._failures = 0
        return LINGER_S
