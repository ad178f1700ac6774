"""Why a request was placed where it was: by HTTP, by gRPC and by the command line, from any of the routers."""

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
from router_rig import Rig, running, tokens_of

from baton.cluster.redis_server import EmbeddedRedis
from baton.rpc import common_pb2, inference_pb2, inference_pb2_grpc
from launcher.cli import run

KEYS = {"acme": "sk-acme-0123456789abcdef", "beta": "sk-beta-0123456789abcdef"}


def speaker(directory: Path, name: str = "decode-1") -> FakeDecodeWorker:
    outputs = [output(token, cached_tokens=1) for token in tokens_of(directory, "hi")]
    last = output(0, finish=STOP, timeline=common_pb2.Timeline(queue_s=0.25, prefill_s=0.5))
    return FakeDecodeWorker(says([*outputs, last]), name)


def as_tenant(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def tenants_file(directory: Path) -> Path:
    tenants = [{"name": n, "api_keys_sha256": [hashlib.sha256(k.encode()).hexdigest()]} for n, k in KEYS.items()]
    file = directory / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    return file


async def know_each_other(*rigs: Rig) -> None:
    async with asyncio.timeout(30):
        for rig in rigs:
            while len((await rig.http.get("/health")).json()["routers"]) < len(rigs) - 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def test_a_decision_is_found_by_the_answers_id(model_directory: Path) -> None:
    async def main() -> None:
        workers = [speaker(model_directory, name) for name in ("decode-1", "decode-2")]
        async with running(model_directory, *workers) as rig:
            response = await rig.complete(n=2)
            request_id = response.headers["x-baton-request-id"]
            told = (await rig.http.get(f"/v1/decisions/{request_id}")).json()
            assert (told["request_id"], told["tenant"]) == (request_id, "default")
            assert [(placement["choice"], placement["attempt"]) for placement in told["placements"]] == [(0, 1), (1, 1)]
            first = told["placements"][0]
            assert first["prompt_tokens"] == response.json()["usage"]["prompt_tokens"]
            assert first["policy"] == "least-added-latency" and first["candidates_considered"] == 2
            assert {candidate["decode_worker"] for candidate in first["candidates"]} == {"decode-1", "decode-2"}
            assert all("others_evicted_s" in candidate for candidate in first["candidates"]), "zeros are told"
            actual = first["actual"]
            assert (actual["outcome"], actual["queue_s"], actual["prefill_s"]) == ("finished", 0.25, 0.5)
            assert actual["cached_tokens"] == 1 and actual["ttft_s"] > 0
            assert "hello" not in json.dumps(told) and "hi" not in json.dumps(actual)

    asyncio.run(main())


def test_what_nobody_remembers_is_told(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory), decisions_max=1) as rig:
            ids = [(await rig.complete()).headers["x-baton-request-id"] for _ in range(2)]
            assert (await rig.http.get(f"/v1/decisions/{ids[1]}")).status_code == 200
            for request_id in (ids[0], "never", "no%20good", "x" * 200):
                response = await rig.http.get(f"/v1/decisions/{request_id}")
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (404, "decision_not_found")
                assert "forgotten" in error["message"]
            bad = await rig.http.get(f"/v1/decisions/{ids[1]}?local=perhaps")
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "local")

    asyncio.run(main())


def test_any_router_tells_what_another_decided(
    model_directory: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        shared: dict[str, Any] = {"redis_url": redis_server.url, "key_prefix": key_prefix}
        async with (
            running(model_directory, worker, **shared) as here,
            running(model_directory, **shared, wait=False) as there,
        ):
            await know_each_other(here, there)
            request_id = (await here.complete()).headers["x-baton-request-id"]
            told = (await there.http.get(f"/v1/decisions/{request_id}")).json()
            assert told == (await here.http.get(f"/v1/decisions/{request_id}")).json()
            assert (await there.http.get(f"/v1/decisions/{request_id}?local=1")).status_code == 404
            async with grpc.aio.insecure_channel(there.router.grpc_address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                decision = await stub.GetDecision(inference_pb2.GetDecisionRequest(request_id=request_id))
                assert decision.placements[0].actual.outcome == "finished"
                alone = inference_pb2.GetDecisionRequest(request_id=request_id, this_router_only=True)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetDecision(alone)
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_a_tenant_sees_its_own_decisions_alone_on_every_router(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        file = tenants_file(tmp_path)
        shared: dict[str, Any] = {"redis_url": redis_server.url, "key_prefix": key_prefix, "tenants_file": file}
        async with (
            running(model_directory, worker, **shared) as here,
            running(model_directory, **shared, wait=False) as there,
        ):
            await know_each_other(here, there)
            body = {"model": "m", "prompt": "hello"}
            response = await here.http.post("/v1/completions", json=body, headers=as_tenant("acme"))
            url = f"/v1/decisions/{response.headers['x-baton-request-id']}"
            for rig in (here, there):
                assert (await rig.http.get(url, headers=as_tenant("acme"))).json()["tenant"] == "acme"
                assert (await rig.http.get(url, headers=as_tenant("beta"))).status_code == 404
                assert (await rig.http.get(url)).status_code == 401

    asyncio.run(main())


def test_the_command_explains_a_real_request(
    model_directory: Path,
    tmp_path: Path,
    redis_server: EmbeddedRedis,
    key_prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        settings: dict[str, Any] = {"redis_url": redis_server.url, "key_prefix": key_prefix}
        async with running(model_directory, worker, tenants_file=tenants_file(tmp_path), **settings) as rig:
            body = {"model": "m", "prompt": "hello"}
            response = await rig.http.post("/v1/completions", json=body, headers=as_tenant("acme"))
            request_id = response.headers["x-baton-request-id"]
            explain = ["explain", request_id, "--url", rig.url]
            assert await asyncio.to_thread(run, [*explain, "--api-key", KEYS["acme"]]) == 0
            shown = capsys.readouterr().out
            assert "decode-1" in shown and "time to first token" in shown
            assert await asyncio.to_thread(run, [*explain, "--api-key", KEYS["acme"], "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["request_id"] == request_id
            for wrong, sentence in (([], "API key"), (["--api-key", KEYS["beta"]], "remembers")):
                assert await asyncio.to_thread(run, [*explain, *wrong]) == 1
                error = capsys.readouterr().err
                assert error.startswith("error: ") and sentence in error and error.count("\n") == 1

    asyncio.run(main())
