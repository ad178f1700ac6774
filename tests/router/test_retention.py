"""How long KV is to be kept: what both doors take, refuse, and hand on with the tenant's name and quota."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from fake_worker import STOP, FakeDecodeWorker, output, says
from router_rig import running, tokens_of

from baton.cluster.redis_server import EmbeddedRedis
from baton.errors import InvalidRequest, SettingsError
from baton.rpc import common_pb2, inference_pb2, inference_pb2_grpc
from router.admission.tenants import read_tenants
from router.http.openai_requests import ChatCompletionRequest, CompletionRequest, parse_request
from router.retention import NO_PROMISE, TTL_MAX_S, Retention

KEYS = {"keeper": "sk-keeper-0123456789abcdef", "plain": "sk-plain-0123456789abcdef"}


def speaker(directory: Path) -> FakeDecodeWorker:
    return FakeDecodeWorker(says([*map(output, tokens_of(directory, "hi")), output(0, finish=STOP)]))


def parsed(cache: object, *, chat: bool = False) -> Retention:
    if chat:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "cache": cache}
        return parse_request(ChatCompletionRequest, json.dumps(body).encode()).retention
    return parse_request(CompletionRequest, json.dumps({"prompt": "x", "cache": cache}).encode()).retention


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_asked_for_is_read(chat: bool) -> None:
    assert parsed({"ttl_s": 90}, chat=chat) == Retention(ttl_s=90.0)
    assert parsed({"pin": True}, chat=chat) == Retention(pin=True)
    assert parsed({"ttl_s": TTL_MAX_S, "pin": False}, chat=chat) == Retention(ttl_s=TTL_MAX_S)
    assert parsed(None, chat=chat) == parsed({}, chat=chat) == NO_PROMISE


@pytest.mark.parametrize(
    ("cache", "param"),
    [
        ({"ttl_s": 0}, "cache.ttl_s"),
        ({"ttl_s": -1}, "cache.ttl_s"),
        ({"ttl_s": TTL_MAX_S + 1}, "cache.ttl_s"),
        ({"ttl_s": "90"}, "cache.ttl_s"),
        ({"pin": 1}, "cache.pin"),
        ({"ttl": 90}, "cache.ttl"),
        (True, "cache"),
    ],
)
def test_what_cannot_be_is_refused_by_name(cache: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(cache)
    assert caught.value.param == param


@pytest.mark.parametrize("ttl_s", [-1.0, float("nan"), float("inf"), TTL_MAX_S * 1.01])
def test_a_time_to_live_is_a_week_at_most(ttl_s: float) -> None:
    with pytest.raises(InvalidRequest, match="604800"):
        Retention(ttl_s)


def test_a_promise_needs_a_quota() -> None:
    assert Retention(60).owned("acme", 5) == Retention(60, False, "acme", 5)
    assert NO_PROMISE.owned("acme", 0) == Retention(tenant="acme")
    for promise in (Retention(60), Retention(pin=True)):
        with pytest.raises(InvalidRequest, match="cache_bytes_max is 0"):
            promise.owned("acme", 0)


def told(retention: common_pb2.CacheRetention) -> tuple[float, bool, str, int]:
    return retention.ttl_s, retention.pin, retention.tenant, retention.quota_bytes


def test_without_tenants_the_quota_is_the_routers(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with running(model_directory, worker, cache_bytes_max="3MiB") as rig:
            assert (await rig.complete(cache={"ttl_s": 60})).status_code == 200
            assert (await rig.chat(cache={"pin": True})).status_code == 200
            assert (await rig.complete(n=2)).status_code == 200
            quota = 3 * 2**20
            assert [told(submit.retention) for submit in worker.submits] == [
                (60, False, "default", quota),
                (0, True, "default", quota),
                (0, False, "default", quota),
                (0, False, "default", quota),
            ]
            bad = await rig.complete(cache={"ttl_s": 60, "forever": True})
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "cache.forever")

    asyncio.run(main())


def test_a_router_may_promise_nothing(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with running(model_directory, worker, cache_bytes_max=0) as rig:
            refused = await rig.complete(cache={"ttl_s": 60})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache")
            assert (await rig.complete(cache={})).status_code == 200

    asyncio.run(main())


def tenants_file(directory: Path) -> Path:
    quotas = {"keeper": {"cache_bytes_max": "2GiB"}, "plain": {}}
    tenants = [
        {"name": name, "api_keys_sha256": [hashlib.sha256(key.encode()).hexdigest()], **quotas[name]}
        for name, key in KEYS.items()
    ]
    file = directory / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    return file


def test_with_tenants_each_has_its_own_quota_and_none_by_default(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        settings: dict[str, Any] = {"tenants_file": tenants_file(tmp_path), "key_prefix": key_prefix}
        async with running(model_directory, worker, redis_url=redis_server.url, **settings) as rig:

            async def complete(tenant: str, **fields: Any) -> int:
                headers = {"authorization": f"Bearer {KEYS[tenant]}"}
                body = {"model": "m", "prompt": "hello", **fields}
                return (await rig.http.post("/v1/completions", json=body, headers=headers)).status_code

            assert await complete("keeper", cache={"ttl_s": 60}) == 200
            assert await complete("plain", cache={"ttl_s": 60}) == 400
            assert await complete("plain") == 200
            assert [told(submit.retention) for submit in worker.submits] == [
                (60, False, "keeper", 2 * 2**30),
                (0, False, "plain", 0),
            ]

    asyncio.run(main())


def test_a_tenants_quota_is_a_size(tmp_path: Path) -> None:
    quotas = {tenant.name: tenant.cache_bytes_max for tenant in read_tenants(tenants_file(tmp_path))}
    assert quotas == {"keeper": 2 * 2**30, "plain": 0}
    file = tmp_path / "bad.yaml"
    file.write_text(tenants_file(tmp_path).read_text().replace("2GiB", "2 barrels"))
    with pytest.raises(SettingsError, match=r"tenants\.0\.cache_bytes_max: a size looks like"):
        read_tenants(file)


def test_the_grpc_door_takes_and_refuses_the_same(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with (
            running(model_directory, worker, cache_bytes_max=7) as rig,
            grpc.aio.insecure_channel(rig.router.grpc_address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)

            async def generate(**cache: Any) -> None:
                request = inference_pb2.GenerateRequest(
                    model="m", text="hello", cache=inference_pb2.CacheOptions(**cache)
                )
                async for _ in stub.Generate(request):
                    pass

            await generate(ttl_s=60, pin=True)
            await generate()
            assert [told(submit.retention) for submit in worker.submits] == [
                (60, True, "default", 7),
                (0, False, "default", 7),
            ]
            for ttl_s in (-1, TTL_MAX_S + 1, float("nan")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(ttl_s=ttl_s)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "cache.ttl_s" in str(caught.value.details())

    asyncio.run(main())
