import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_worker import STOP, FakeDecodeWorker, is_silent, output, says
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from router_rig import Rig, running, tokens_of

from baton.rpc import common_pb2, inference_pb2, inference_pb2_grpc


@asynccontextmanager
async def calling(directory: Path, *workers: FakeDecodeWorker, **settings: Any) -> AsyncIterator[tuple[Rig, Any, Any]]:
    async with (
        running(directory, *workers, **settings) as rig,
        grpc.aio.insecure_channel(rig.router.grpc_address) as channel,
    ):
        yield rig, channel, inference_pb2_grpc.InferenceStub(channel)


def speaker(directory: Path, text: str) -> FakeDecodeWorker:
    last = output(0, finish=STOP, cached_tokens=1, timeline=common_pb2.Timeline(transport="shm"))
    return FakeDecodeWorker(says([*map(output, tokens_of(directory, text)), last]))


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


def test_text_and_token_ids_generate_alike(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "wörld 😀")
        async with calling(model_directory, worker) as (_, _, stub):
            ids = common_pb2.TokenIds(ids=tokens_of(model_directory, "hello"))
            prompts: list[dict[str, Any]] = [{"text": "hello"}, {"token_ids": ids}]
            for prompt in prompts:
                request = inference_pb2.GenerateRequest(request_id="mine", model="m", **prompt)
                responses = [response async for response in stub.Generate(request)]
                assert "".join(response.text for response in responses) == "wörld 😀"
                last = responses[-1]
                assert (last.request_id, last.finish_reason) == ("mine", common_pb2.FINISH_REASON_STOP)
                assert (last.usage.cached_tokens, last.timeline.transport) == (1, "shm")
                assert last.usage.completion_tokens == sum(len(response.token_ids) for response in responses)
            assert worker.submits[0].prompt == worker.submits[1].prompt
            assert worker.submits[0].sampling.max_tokens == 1000 - len(worker.submits[0].prompt)

    asyncio.run(main())


BAD_REQUESTS: list[dict[str, Any]] = [
    {},
    {"text": "a", "sampling": common_pb2.SamplingParams(temperature=-1)},
    {"text": "a", "sampling": common_pb2.SamplingParams(temperature=float("nan"))},
    {"text": "a", "sampling": common_pb2.SamplingParams(max_tokens=1000)},
    {"text": "a", "stop": ["x"] * 17},
    {"text": "a", "request_id": "no good"},
    {"text": "a", "cache_salt": "x" * 257},
    {"text": ""},
    {"token_ids": common_pb2.TokenIds(ids=[400])},
    {"token_ids": common_pb2.TokenIds(ids=[2**32 - 1])},
]
GARBAGE = [b"\xff\xff\xff", b"\x1a\x02\xff\xfe", b"\x0a\x7f"]
"""The second is a well-formed message whose text is not UTF-8."""


def test_bad_requests_and_bad_bytes_are_invalid_arguments_with_a_sentence(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with calling(model_directory, worker) as (rig, channel, stub):
            raw = channel.unary_stream("/baton.v1.Inference/Generate")
            calls = [stub.Generate(inference_pb2.GenerateRequest(**fields)) for fields in BAD_REQUESTS]
            for call in [*calls, *map(raw, GARBAGE)]:
                error = await failure_of(call)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
                assert (error.details() or "").endswith(".")
            error = await failure_of(stub.Generate(inference_pb2.GenerateRequest(text="a", model="other")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert worker.submits == []
            labels = {"model": "m", "protocol": "grpc", "endpoint": "Generate"}
            for model, bad in (("m", BAD_REQUESTS), ("", GARBAGE)):
                counted = rig.metric("baton_requests_total", code="INVALID_ARGUMENT", **labels | {"model": model})
                assert counted == len(bad)
            assert [r async for r in stub.Generate(inference_pb2.GenerateRequest(text="a"))]

    asyncio.run(main())


def test_too_large_a_message_is_refused_and_the_server_lives(model_directory: Path) -> None:
    async def main() -> None:
        async with calling(model_directory, speaker(model_directory, "x"), body_bytes_max=10_000) as (_, _, stub):
            error = await failure_of(stub.Generate(inference_pb2.GenerateRequest(text="x" * 20_000)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert [r async for r in stub.Generate(inference_pb2.GenerateRequest(text="a"))]

    asyncio.run(main())


@pytest.mark.parametrize("by_deadline", [False, True])
def test_the_callers_cancellation_and_deadline_reach_the_worker(model_directory: Path, by_deadline: bool) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with calling(model_directory, worker) as (_, _, stub):
            call = stub.Generate(inference_pb2.GenerateRequest(text="a"), timeout=0.2 if by_deadline else None)
            reading = asyncio.create_task(failure_of(call)) if by_deadline else asyncio.create_task(call.read())
            await worker.until(lambda worker: bool(worker.submits))
            if not by_deadline:
                call.cancel()
            await worker.until(lambda worker: bool(worker.cancels))
            await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(main())


def test_without_a_worker_it_is_unavailable_and_health_says_so(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with worker, calling(model_directory, wait=False) as (rig, channel, stub):
            health = health_pb2_grpc.HealthStub(channel)
            watched = health.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            error = await failure_of(stub.Generate(inference_pb2.GenerateRequest(text="a")))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert not (await stub.ListModels(inference_pb2.ListModelsRequest())).models[0].ready
            rig.membership.change([worker.info])
            async with asyncio.timeout(30):
                assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
            (model,) = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
            assert (model.name, model.context_length, model.ready) == ("m", 1000, True)
            watched.cancel()

    asyncio.run(main())


def test_reflection_lists_the_service(model_directory: Path) -> None:
    async def main() -> None:
        async with calling(model_directory, speaker(model_directory, "x")) as (_, channel, _):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
            assert "baton.v1.Inference" in {service.name for service in answer.list_services_response.service}

    asyncio.run(main())
