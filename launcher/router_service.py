"""The router as a process's service: with its Redis, its view of the cluster and its model's files."""

import asyncio
from contextlib import AsyncExitStack

from baton.cluster.membership import MembershipWatch
from baton.cluster.redis_client import connect_redis
from baton.settings import RouterSettings
from engine.model.source import find_model
from router.app import Router


class RouterService:
    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._exits = AsyncExitStack()
        self._router: Router | None = None

    @property
    def url(self) -> str:
        return f"http://{self.router.http_address}"

    @property
    def addresses(self) -> str:
        return f"{self.url} grpc {self.router.grpc_address}"

    @property
    def router(self) -> Router:
        assert self._router is not None, "not started"
        return self._router

    async def start(self) -> None:
        """Returns when both ports are open, with or without a worker to serve requests."""
        redis = await connect_redis(self._settings.redis_url)
        self._exits.push_async_callback(redis.aclose)
        watch = MembershipWatch(redis, self._settings.key_prefix)
        self._exits.push_async_callback(watch.close)
        await watch.start()
        models = {model.model for model in self._settings.served_models}
        directories = {model: await asyncio.to_thread(find_model, model) for model in sorted(models)}
        self._router = Router(self._settings, watch, directories, redis=redis)
        self._exits.push_async_callback(self._router.stop)
        await self._router.start()

    async def failed(self) -> None:
        await asyncio.Event().wait()

    async def drain(self) -> None:
        await self.router.drain()

    async def stop(self) -> None:
        await self._exits.aclose()
