"""Several models behind one router."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import openai
import pytest
from fake_worker import STOP, FakeDecodeWorker, output, says
from router_rig import Rig, running, tokens_of

from baton.rpc import inference_pb2, inference_pb2_grpc

MODELS: list[dict[str, Any]] = [
    {"name": "small", "model": "text-model", "aliases": ["default", "gpt-4o-mini"]},
    {"name": "large", "model": "text-model", "context_length_max": 100},
]


def speaker(directory: Path, name: str, model: str, text: str, **options: Any) -> FakeDecodeWorker:
    outputs = [*map(output, tokens_of(directory, text)), output(0, finish=STOP)]
    return FakeDecodeWorker(says(outputs), name, model=model, **options)


def both(directory: Path) -> list[FakeDecodeWorker]:
    return [speaker(directory, "decode-s", "small", "hi"), speaker(directory, "decode-l", "large", "good day")]


async def texts(rig: Rig, *models: str) -> list[str]:
    return [(await rig.complete(model=model)).json()["choices"][0]["text"] for model in models]


def test_each_model_is_served_by_its_own_workers_under_every_name(model_directory: Path) -> None:
    async def main() -> None:
        workers = both(model_directory)
        async with running(model_directory, *workers, models=MODELS) as rig:
            assert await texts(rig, "small", "large", "default", "gpt-4o-mini") == ["hi", "good day", "hi", "hi"]
            assert [len(worker.submits) for worker in workers] == [3, 1]
            for name in ("small", "default"):
                assert (await rig.complete(model=name)).json()["model"] == name, "the name that was asked for"
            for model, count in (("small", 5), ("large", 1)):
                labels = {"model": model, "protocol": "http", "endpoint": "/v1/completions", "code": "200"}
                assert rig.metric("baton_requests_total", **labels) == count
                assert rig.metric("baton_time_to_first_token_seconds_count", model=model) == count
            assert rig.metric("baton_generation_tokens_total", model="large") > 0

    asyncio.run(main())


def test_a_request_must_say_which_of_several_models(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, *both(model_directory), models=MODELS) as rig:
            for body in ({"prompt": "hello"}, {"prompt": "hello", "model": "other"}):
                response = await rig.http.post("/v1/completions", json=body)
                error = response.json()["error"]
                assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
                assert "'small', 'large'" in error["message"]

    asyncio.run(main())


def test_models_are_listed_with_their_aliases_and_contexts(model_directory: Path) -> None:
    async def main() -> None:
        workers = both(model_directory)
        async with running(model_directory, *workers, models=MODELS) as rig:
            small, large = (await rig.http.get("/v1/models")).json()["data"]
            assert (small["id"], small["aliases"], small["max_model_len"]) == ("small", MODELS[0]["aliases"], 1000)
            assert (large["id"], large["aliases"], large["max_model_len"]) == ("large", [], 100)
            assert (await rig.http.get("/v1/models/default")).json() == small
            rig.membership.change([workers[0].info])
            async with asyncio.timeout(30):
                while (await rig.http.get("/v1/models/large")).json()["max_model_len"]:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as client:
                assert [model.id async for model in client.models.list()] == ["small", "large"]
                completion = await client.completions.create(model="gpt-4o-mini", prompt="hello")
                assert completion.model == "gpt-4o-mini"
                with pytest.raises(openai.InternalServerError):
                    await client.completions.create(model="large", prompt="hello")
            health = await rig.http.get("/health")
            assert health.status_code == 200, "one model can be served"
            assert health.json()["models"] == {"small": {"ready": True}, "large": {"ready": False}}

    asyncio.run(main())


def test_the_servers_own_context_limit_is_told_with_its_numbers(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, *both(model_directory), models=MODELS) as rig:
            response = await rig.complete(model="large", prompt=[5] * 90, max_tokens=11)
            message = response.json()["error"]["message"]
            assert response.status_code == 400
            assert "101 tokens" in message and "the context that this server gives the model is 100 tokens" in message
            assert (await rig.complete(model="small", prompt=[5] * 90, max_tokens=11)).status_code == 200

    asyncio.run(main())


def test_workers_of_other_models_are_shown_with_their_pool_and_not_used(model_directory: Path) -> None:
    async def main() -> None:
        stranger = speaker(model_directory, "decode-x", "unknown", "no")
        async with running(model_directory, *both(model_directory), stranger, models=MODELS) as rig:
            shown = (await rig.http.get("/v1/workers")).json()["data"]
            assert {worker["worker_id"]: worker["model"] for worker in shown} == {
                "decode-s": "small",
                "decode-l": "large",
                "decode-x": "unknown",
            }
            assert {worker["pool"] for worker in shown} == {"default"}
            assert (await rig.complete(model="unknown")).status_code == 404

    asyncio.run(main())


def test_the_grpc_door_serves_all_models(model_directory: Path) -> None:
    async def main() -> None:
        async with (
            running(model_directory, *both(model_directory), models=MODELS) as rig,
            grpc.aio.insecure_channel(rig.router.grpc_address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            listed = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
            assert [(model.name, list(model.aliases), model.context_length, model.ready) for model in listed] == [
                ("small", ["default", "gpt-4o-mini"], 1000, True),
                ("large", [], 100, True),
            ]
            parts = [
                part.text async for part in stub.Generate(inference_pb2.GenerateRequest(text="a", model="default"))
            ]
            assert "".join(parts) == "hi"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(inference_pb2.GenerateRequest(text="a")).read()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            labels = {"protocol": "grpc", "endpoint": "Generate"}
            assert rig.metric("baton_requests_total", model="small", code="OK", **labels) == 1
            assert rig.metric("baton_requests_total", model="", code="NOT_FOUND", **labels) == 1

    asyncio.run(main())


def test_models_with_the_same_files_share_a_tokenizer(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, wait=False, models=MODELS) as rig:
            small, large = rig.router._catalog
            assert small.tokenizer is large.tokenizer and small.generator is not large.generator

    asyncio.run(main())
