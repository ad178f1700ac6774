"""Routers beside each other: they know each other's load and decisions, and live on without Redis."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import psutil
from fake_worker import FakeDecodeWorker, is_silent, speaks
from listed_membership import ListedMembership
from prometheus_client import CollectorRegistry

from baton.cluster.redis_client import redis_client
from baton.cluster.redis_server import EmbeddedRedis
from baton.cluster.router_info import RouterInfo
from baton.ids import RequestId, WorkerId
from baton.rpc import inference_pb2, inference_pb2_grpc
from baton.settings import RouterSettings
from router.app import Router
from router.peers import Peers

PATIENCE_S = 60.0


@asynccontextmanager
async def routing(
    directory: Path, server: EmbeddedRedis, prefix: str, *workers: FakeDecodeWorker, **settings: Any
) -> AsyncIterator[Router]:
    """A ready router of these workers, which run already."""
    chosen = RouterSettings(model="m", http_port=0, drain_timeout_s=1, key_prefix=prefix, **settings)
    redis = redis_client(server.url)
    membership = ListedMembership([worker.info for worker in workers])
    router = Router(chosen, membership, {"m": directory}, CollectorRegistry(), redis=redis)
    try:
        await router.start()
        async with asyncio.timeout(PATIENCE_S):
            await router.ready()
        yield router
    finally:
        await router.stop()
        await redis.aclose()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - what is waited for is another router, by way of Redis
            await asyncio.sleep(0.01)


async def ask(router: Router, request_id: str = "mine", **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{router.http_address}", timeout=PATIENCE_S) as http:
        body = {"model": "m", "prompt": "hello", "max_tokens": 5, "seed": 1, **fields}
        return await http.post("/v1/completions", json=body, headers={"x-request-id": request_id})


async def get(router: Router, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{router.http_address}", timeout=PATIENCE_S) as http:
        return await http.get(path)


def test_routers_see_each_others_load(model_directory: Path, redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with (
            FakeDecodeWorker(is_silent) as worker,
            routing(model_directory, redis_server, key_prefix, worker) as one,
            routing(model_directory, redis_server, key_prefix, worker) as two,
        ):
            asking = asyncio.create_task(ask(one))
            await worker.until(lambda worker: bool(worker.submits))
            placed = one._cluster.placer.placed()
            assert placed[WorkerId("decode-1")].sequences == 1
            await until(lambda: two._cluster.routers.placed() == {one._cluster.router_id: placed})  # type: ignore[union-attr]
            assert two._cluster.placer.queue_s("m") > 0
            (peer,) = (await get(two, "/health")).json()["routers"]
            assert (peer["router"], peer["load_is_known"]) == (one._cluster.router_id, True)
            asking.cancel()
            await worker.until(lambda worker: bool(worker.cancels))
            await until(lambda: not any(two._cluster.routers.placed().values()))  # type: ignore[union-attr]

    asyncio.run(main())


def test_a_decision_is_found_at_whichever_router_made_it(
    model_directory: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with (
            FakeDecodeWorker(speaks) as worker,
            routing(model_directory, redis_server, key_prefix, worker) as one,
            routing(model_directory, redis_server, key_prefix, worker) as two,
        ):
            assert (await ask(one)).status_code == 200
            await until(lambda: bool(two._cluster.peers()))
            answers = [(await get(router, "/v1/decisions/mine")).json() for router in (one, two)]
            assert answers[0] == answers[1]
            (placement,) = answers[0]["placements"]
            assert placement["router"] == one._cluster.router_id
            assert placement["candidates"][0]["decode_worker"] == "decode-1"
            assert placement["actual"]["outcome"] == "finished"
            assert (await get(two, "/v1/decisions/mine?local=1")).status_code == 404
            assert (await get(two, "/v1/decisions/another")).status_code == 404
            async with grpc.aio.insecure_channel(two.grpc_address) as channel:
                request = inference_pb2.GetDecisionRequest(request_id="mine")
                found = await inference_pb2_grpc.InferenceStub(channel).GetDecision(request)
                assert found.placements[0].router == one._cluster.router_id

    asyncio.run(main())


def test_a_peer_that_is_gone_is_asked_in_vain() -> None:
    gone = RouterInfo(router_id="gone", grpc_address="127.0.0.1:9", http_address="127.0.0.1:9")

    async def main() -> None:
        assert await Peers(lambda: [gone]).decision(RequestId("r"), None) is None
        assert await Peers(list).decision(RequestId("r"), None) is None

    asyncio.run(main())


def test_without_redis_a_router_serves_on_and_says_so(model_directory: Path, key_prefix: str) -> None:
    async def main(server: EmbeddedRedis) -> None:
        async with (
            FakeDecodeWorker(speaks) as worker,
            routing(model_directory, server, key_prefix, worker) as one,
            routing(model_directory, server, key_prefix, worker) as two,
        ):
            await until(lambda: bool(one._cluster.peers()) and bool(two._cluster.peers()))
            os.kill(server.pid, signal.SIGKILL)
            psutil.Process(server.pid).wait(PATIENCE_S)
            await until(lambda: one._cluster.health()["redis_away"])
            assert (await ask(one)).status_code == 200
            health = await get(one, "/health")
            assert health.status_code == 200
            assert health.json()["redis_away"] and health.json()["routers"]
            assert (await get(two, "/v1/decisions/mine")).status_code == 200, "peers stay known"
            server.start()
            await until(lambda: not one._cluster.health()["redis_away"] and bool(one._cluster.routers.placed()))  # type: ignore[union-attr]
            assert (await ask(one)).status_code == 200

    with EmbeddedRedis() as server:
        asyncio.run(main(server))


def test_a_router_without_redis_knows_what_it_sent_where(model_directory: Path) -> None:
    async def main() -> None:
        async with FakeDecodeWorker(speaks) as worker:
            membership = ListedMembership([worker.info])
            settings = RouterSettings(model="m", http_port=0, drain_timeout_s=1)
            router = Router(settings, membership, {"m": model_directory}, CollectorRegistry())
            await router.start()
            async with asyncio.timeout(PATIENCE_S):
                await router.ready()
            prompt = list(range(100, 164))
            for request_id in ("first", "second"):
                assert (await ask(router, request_id, prompt=prompt)).status_code == 200
            cached = [
                (await get(router, f"/v1/decisions/{request_id}")).json()["placements"][0]["candidates"][0]
                for request_id in ("first", "second")
            ]
            assert cached[0]["cached_tokens_hbm"] == 0
            assert cached[1]["cached_tokens_hbm"] >= 48
            index = (await get(router, "/health")).json()["index"]
            assert not index["fresh"] and "no KV events" in index["reason"]
            slot = router._cluster.index.slot_of(WorkerId("decode-1"))
            assert slot is not None
            membership.change([])
            await until(lambda: router._cluster.index.slot_of(WorkerId("decode-1")) is None)
            await router.stop()

    asyncio.run(main())


def test_it_is_not_ready_before_it_is_warm(model_directory: Path, redis_server: EmbeddedRedis, key_prefix: str) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    class Hesitant(FakeDecodeWorker):
        async def GetCacheSnapshot(self, request: object, context: Any) -> None:  # noqa: N802
            del request
            asked.set()
            await answer.wait()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    async def main() -> None:
        async with Hesitant(speaks) as worker:
            redis = redis_client(redis_server.url)
            settings = RouterSettings(model="m", http_port=0, drain_timeout_s=1, key_prefix=key_prefix)
            router = Router(
                settings, ListedMembership([worker.info]), {"m": model_directory}, CollectorRegistry(), redis=redis
            )
            await router.start()
            async with asyncio.timeout(PATIENCE_S):
                await asked.wait()
                while not router._cluster.pool.usable("m"):
                    await router._cluster.pool.changed()
            assert not router.is_ready
            health = await get(router, "/health")
            assert health.status_code == 503 and "which KV blocks lie where" in health.json()["reason"]
            answer.set()
            async with asyncio.timeout(PATIENCE_S):
                await router.ready()
            health = await get(router, "/health")
            assert health.status_code == 200
            assert list(health.json()["index"]["stale_workers"]) == ["decode-1"]
            await router.stop()
            await redis.aclose()

    asyncio.run(main())
