"""A router in this process, in front of fake decode workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fake_worker import FakeDecodeWorker
from listed_membership import ListedMembership
from prometheus_client import CollectorRegistry

from baton.cluster.redis_client import connect_redis
from baton.settings import RouterSettings
from router.app import Router
from router.text.tokenizer import Tokenizer


class Rig:
    def __init__(self, router: Router, membership: ListedMembership, registry: CollectorRegistry) -> None:
        self.router, self.membership, self.registry = router, membership, registry
        self.url = f"http://{router.http_address}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=60)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "m", "prompt": "hello"} | fields)

    async def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return await self.http.post("/v1/chat/completions", json={"model": "m", "messages": messages} | fields)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running(
    directory: Path, *workers: FakeDecodeWorker, wait: bool = True, redis_url: str | None = None, **settings: Any
) -> AsyncIterator[Rig]:
    """Starts the workers, then a router that knows them; returns when it is ready. All models' files lie in the one
    directory."""
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        membership, registry = ListedMembership([worker.info for worker in workers]), CollectorRegistry()
        defaults: dict[str, Any] = {"model": "m", "http_port": 0, "drain_timeout_s": 1, "failover_wait_s": 0}
        chosen = RouterSettings(**defaults | settings)
        redis = None
        if redis_url is not None:
            redis = await connect_redis(redis_url)
            stack.push_async_callback(redis.aclose)
        directories = {model.model: directory for model in chosen.served_models}
        router = Router(chosen, membership, directories, registry, redis=redis)
        stack.push_async_callback(router.stop)
        await router.start()
        if wait:
            async with asyncio.timeout(30):
                await router.ready()
        rig = Rig(router, membership, registry)
        stack.push_async_callback(rig.http.aclose)
        yield rig


def tokens_of(directory: Path, text: str) -> list[int]:
    return Tokenizer.load(directory).encode(text)
