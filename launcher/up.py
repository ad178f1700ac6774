"""`baton up`: Redis, Ray, the workers and the router as one service."""

import asyncio
import importlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from baton.cluster.redis_server import EmbeddedRedis
from baton.secret import with_secret
from baton.settings import RouterSettings, UpSettings
from launcher.checks import check_model, check_redis
from launcher.plan import check_settings, plan_workers, settings_for
from launcher.progress import Progress
from launcher.ray_cluster import RayCluster, RayWorker, WorkerLost
from launcher.supervisor import first_start, watch_over

if TYPE_CHECKING:
    from launcher.router_service import RouterService

log = logging.getLogger(__name__)

WORKER_START_TIMEOUT_S = 1800.0
"""A first start may download the model."""
WORKER_STOP_TIMEOUT_S = 10.0
ROUTER_READY_TIMEOUT_S = 30.0
REDIS_WATCH_S = 0.25


class Deployment:
    """A whole Baton: the router runs in this process, each worker in a Ray actor."""

    def __init__(self, settings: UpSettings, progress: Progress) -> None:
        self._settings, self._progress = settings, progress
        self._workers: list[RayWorker] = []
        self._exits = AsyncExitStack()
        self._router: RouterService | None = None

    @property
    def router(self) -> "RouterService":
        assert self._router is not None, "not started"
        return self._router

    async def start(self) -> None:
        """Returns when requests can be served. Raises BatonError with what is wrong, and before anything
        heavy is started if it can be seen by then."""
        check_settings(self._settings)
        self._settings = with_secret(self._settings)
        async with self._progress.step(f"looking for the model {self._settings.model}"):
            await asyncio.to_thread(find, self._settings.model)
        redis_url = await self._find_redis()
        cluster = RayCluster(self._settings.ray_address, is_debugging=self._settings.log_level == "debug")
        self._exits.push_async_callback(cluster.stop)
        async with self._progress.step("starting Ray" if cluster.is_own else "connecting to Ray"):
            await cluster.start()
        await self._start_workers(cluster, redis_url)
        async with self._progress.step("starting the router"):
            await self._start_router(redis_url)

    async def failed(self) -> None:
        await asyncio.Event().wait()  # what dies is brought back

    async def drain(self) -> None:
        await self.router.drain()
        await self._ask_workers(RayWorker.drain)

    async def stop(self) -> None:
        await self._exits.aclose()

    async def _find_redis(self) -> str:
        if self._settings.redis_url is not None:
            await check_redis(self._settings.redis_url)
            return self._settings.redis_url
        redis = EmbeddedRedis()
        self._exits.callback(redis.stop)
        redis.start()  # on this thread, because Redis dies with the thread that starts it
        await self._exits.enter_async_context(background(keep_running(redis)))
        return redis.url

    async def _start_workers(self, cluster: RayCluster, redis_url: str) -> None:
        plans = plan_workers(self._settings, redis_url, run_id=secrets.token_hex(2))
        async with self._progress.step(f"loading {self._settings.model_name} on {len(plans)} workers"):
            workers = [await cluster.place(plan) for plan in plans]
            await all_or_first_failure(first_start(worker, WORKER_START_TIMEOUT_S) for worker in workers)
        self._workers = workers
        self._exits.push_async_callback(self._ask_workers, RayWorker.stop)
        for worker in workers:
            await self._exits.enter_async_context(background(watch_over(worker)))

    async def _start_router(self, redis_url: str) -> None:
        module = await asyncio.to_thread(importlib.import_module, "launcher.router_service")
        self._router = module.RouterService(settings_for(RouterSettings, self._settings, redis_url=redis_url))
        self._exits.push_async_callback(self.router.stop)
        await self.router.start()
        async with asyncio.timeout(ROUTER_READY_TIMEOUT_S):
            await self.router.router.ready()

    async def _ask_workers(self, method: Callable[[RayWorker], Awaitable[None]]) -> None:
        """A worker that is dead already has nothing left to drain or stop."""
        timeout_s = self._settings.drain_timeout_s + WORKER_STOP_TIMEOUT_S
        asked = (within(timeout_s, method(worker)) for worker in self._workers)
        for worker, outcome in zip(self._workers, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if isinstance(outcome, WorkerLost | TimeoutError):
                log.warning("%s did not answer (%s)", worker.name, type(outcome).__name__)
            elif isinstance(outcome, BaseException):
                raise outcome


def find(model: str) -> None:
    """Makes sure that the model's files are here, so that the workers need not each download them."""
    check_model(model)
    from engine.model.source import find_model

    find_model(model)


async def all_or_first_failure(work: Iterable[Awaitable[None]]) -> None:
    """Cancels the rest when one fails."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(timeout_s: float, work: Awaitable[None]) -> None:
    async with asyncio.timeout(timeout_s):
        await work


@asynccontextmanager
async def background(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, Exception):
            log.error("a background task ended early", exc_info=outcome)


async def keep_running(redis: EmbeddedRedis) -> None:
    """Brings Redis back when it dies. It comes back empty; the workers announce themselves anew."""
    while True:
        await asyncio.sleep(REDIS_WATCH_S)
        if not redis.is_running:
            log.warning("the embedded Redis died; starting it again")
            redis.start()
