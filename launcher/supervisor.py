"""Watches a worker that Ray restarts: says when it dies, and keeps a start that fails from being tried in a rush."""

import asyncio
import logging
from typing import Protocol

from baton.errors import Unavailable
from launcher.ray_cluster import WorkerLost
from launcher.worker_actor import StartOutcome

log = logging.getLogger(__name__)

RETRY_S = 0.5
RETRY_MAX_S = 30.0


class Restartable(Protocol):
    """What the supervisor needs of a RayWorker."""

    name: str

    async def outcome(self) -> StartOutcome: ...

    async def until_death(self) -> None: ...

    def kill(self) -> None: ...


def retry_delay_s(failures: int) -> float:
    """Doubles from RETRY_S to RETRY_MAX_S."""
    return min(RETRY_MAX_S, RETRY_S * 2.0 ** min(failures - 1, 16))


async def first_start(worker: Restartable, timeout_s: float) -> None:
    """Raises the worker's own sentence if its first start fails: it would fail again."""
    try:
        async with asyncio.timeout(timeout_s):
            outcome = await worker.outcome()
    except WorkerLost:
        raise Unavailable(f"{worker.name} died while it started; --log-level debug shows its last words.") from None
    except TimeoutError:
        raise Unavailable(f"{worker.name} did not start within {timeout_s:g} s: is there room for it?") from None
    if outcome.failure:
        raise Unavailable(f"{worker.name} could not start: {outcome.failure}")


async def watch_over(worker: Restartable) -> None:
    """For ever: waits until the worker dies, and until its next life serves."""
    while True:
        try:
            await worker.until_death()
        except WorkerLost:
            log.warning("%s died; Ray starts it again", worker.name)
        await until_restarted(worker)
        log.warning("%s is back", worker.name)


async def until_restarted(worker: Restartable) -> None:
    failures = 0
    while not await is_serving(worker):
        failures += 1
        await asyncio.sleep(retry_delay_s(failures))


async def is_serving(worker: Restartable) -> bool:
    """False, and this life ended, if its worker could not start."""
    try:
        outcome = await worker.outcome()
        if not outcome.failure:
            return True
        log.error("%s could not start again: %s", worker.name, outcome.failure)
        worker.kill()
    except WorkerLost:
        log.debug("%s is not back yet", worker.name)
    return False
