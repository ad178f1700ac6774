"""A model's upstream behind the HTTP door: another Baton, or a server that says what it is told to."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
import yaml
from fake_worker import STOP, FakeDecodeWorker, failure, is_silent, output, says
from router_rig import Rig, running, tokens_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from baton.cluster.redis_server import EmbeddedRedis
from baton.rpc import inference_pb2, inference_pb2_grpc, worker_pb2
from router.http.server import HttpServer

Handler = Callable[[Request], Awaitable[Response]]
KEY = "sk-acme-0123456789abcdef"


def speaker(directory: Path, text: str, **options: Any) -> FakeDecodeWorker:
    outputs = [*map(output, tokens_of(directory, text)), output(0, finish=STOP)]
    return FakeDecodeWorker(says(outputs), **options)


class Elsewhere:
    """An OpenAI-like server, and what it was asked."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.left = asyncio.Event()
        self.server = HttpServer(
            Starlette(routes=[Route("/v1/{path:path}", self._answer, methods=["POST"])]), "127.0.0.1", 0, 1
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/v1"

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(httpx.Headers(list(request.headers.items())))
        return await self._handler(request)


@asynccontextmanager
async def elsewhere(handler: Handler) -> AsyncIterator[Elsewhere]:
    there = Elsewhere(handler)
    await there.server.start()
    try:
        yield there
    finally:
        await there.server.stop()


def models(url: str, use: str = "overflow", **upstream: Any) -> list[dict[str, Any]]:
    return [{"name": "m", "model": "text-model", "upstream": {"url": url, "model": "theirs", "use": use, **upstream}}]


async def connected(here: Rig) -> None:
    """The router is ready without workers already."""
    async with asyncio.timeout(30):
        while not all(served.is_ready for served in here.router._catalog):
            await here.router._cluster.pool.changed()


async def says_theirs(request: Request) -> Response:
    del request
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return JSONResponse({"object": "text_completion", "model": "theirs", "choices": [], "usage": usage})


def test_another_baton_is_an_upstream_whole_and_streamed(model_directory: Path) -> None:
    async def main() -> None:
        there_models = [{"name": "theirs", "model": "text-model"}]
        worker = speaker(model_directory, "from afar", model="theirs")
        async with (
            running(model_directory, worker, models=there_models) as there,
            running(model_directory, wait=False, models=models(f"{there.url}/v1", "fallback")) as here,
            openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0) as client,
        ):
            whole = await client.completions.with_raw_response.create(model="m", prompt="hello")
            assert whole.parse().choices[0].text == "from afar" and whole.parse().model == "theirs"
            assert whole.headers["x-baton-upstream"] == "fallback" and whole.headers["x-baton-request-id"]
            messages: Any = [{"role": "user", "content": "hello"}]
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "from afar"
            assert len(worker.submits) == 2
            assert here.metric("baton_upstream_requests_total", model="m", code="200") == 2
            assert (await here.http.get("/health")).status_code == 200, "it can serve, if not by itself"

    asyncio.run(main())


def test_overflow_is_for_what_does_not_fit_here(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with (
            elsewhere(says_theirs) as there,
            running(model_directory, worker, models=models(there.url), requests_max=3) as here,
        ):
            await connected(here)
            waiting = asyncio.create_task(here.complete(n=2))
            await worker.until(lambda worker: len(worker.submits) == 2)
            response = await here.complete(n=2, cache_salt="s", timeline=True, service_tier="priority")
            assert response.status_code == 200 and response.json()["model"] == "theirs"
            assert there.bodies == [{"model": "theirs", "prompt": "hello", "n": 2}]
            assert "authorization" not in there.headers[0]
            waiting.cancel()
            await worker.until(lambda worker: len(worker.cancels) == 2)
            worker.script = says([output(0, finish=STOP)])
            assert "x-baton-upstream" not in (await here.complete()).headers, "there is room again"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "use", "goes"),
    [
        (worker_pb2.ERROR_KIND_OVERLOADED, "overflow", True),
        (worker_pb2.ERROR_KIND_OVERLOADED, "fallback", False),
        (worker_pb2.ERROR_KIND_UNAVAILABLE, "fallback", True),
        (worker_pb2.ERROR_KIND_INVALID_REQUEST, "overflow", False),
        (worker_pb2.ERROR_KIND_INTERNAL, "overflow", False),
    ],
)
def test_what_a_worker_refuses_before_the_first_token_may_go_upstream(
    model_directory: Path, kind: int, use: str, goes: bool
) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(says([failure(kind)]))
        async with (
            elsewhere(says_theirs) as there,
            running(model_directory, worker, models=models(there.url, use), failover_max=0) as here,
        ):
            await connected(here)
            for stream in (False, True):
                response = await here.complete(stream=stream)
                assert (response.status_code == 200) is goes
            assert len(there.bodies) == 2 * goes
            assert here.router._admission.in_flight == 0

    asyncio.run(main())


def test_a_stream_that_has_begun_here_ends_here(model_directory: Path) -> None:
    async def main() -> None:
        outputs = [output(*tokens_of(model_directory, "a")), failure(worker_pb2.ERROR_KIND_OVERLOADED)]
        worker = FakeDecodeWorker(says(outputs))
        async with (
            elsewhere(says_theirs) as there,
            running(model_directory, worker, models=models(there.url), failover_max=0) as here,
        ):
            await connected(here)
            response = await here.complete(stream=True)
            assert response.status_code == 200 and "It went wrong." in response.text
            assert not there.bodies

    asyncio.run(main())


def test_always_asks_no_worker_and_keeps_errors_of_the_request_here(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "mine")
        async with (
            elsewhere(says_theirs) as there,
            running(model_directory, worker, models=models(there.url, "always")) as here,
        ):
            await connected(here)
            assert (await here.complete()).json()["model"] == "theirs"
            assert (await here.complete(n=0)).status_code == 400
            assert len(there.bodies) == 1 and not worker.submits
            async with grpc.aio.insecure_channel(here.router.grpc_address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await (
                        inference_pb2_grpc.InferenceStub(channel)
                        .Generate(inference_pb2.GenerateRequest(text="a"))
                        .read()
                    )
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "by HTTP" in (caught.value.details() or "")

    asyncio.run(main())


def test_the_upstream_gets_its_own_key_and_never_the_clients(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        (tmp_path / "key").write_text("sk-theirs")
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        tenant = {"name": "acme", "api_keys_sha256": [digest], "tokens_per_minute": 60, "burst_tokens": 60}
        (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": [tenant]}))
        async with (
            elsewhere(says_theirs) as there,
            running(
                model_directory,
                wait=False,
                models=models(there.url, api_key_file=str(tmp_path / "key")),
                tenants_file=tmp_path / "tenants.yaml",
                redis_url=redis_server.url,
                key_prefix=key_prefix,
            ) as here,
        ):
            here.http.headers["authorization"] = f"Bearer {KEY}"
            assert (await here.complete(max_tokens=4)).status_code == 200
            assert there.headers[0]["authorization"] == "Bearer sk-theirs"
            assert KEY not in str(there.headers)
            used = here.metric("baton_tenant_tokens_total", tenant="acme")
            assert used == 7, "as the upstream tells"
            refused = await here.complete(max_tokens=100)
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert len(there.bodies) == 1, "a tenant's own limit holds for what is sent on as well"

    asyncio.run(main())


def test_what_fails_there_is_a_502_or_429_of_ours(model_directory: Path) -> None:
    answers = {
        401: (502, "upstream_failed"),
        404: (502, "upstream_failed"),
        500: (502, "upstream_failed"),
        429: (429, "overloaded"),
    }

    async def main() -> None:
        async def refuses(request: Request) -> Response:
            asked = (await request.json())["user"]
            return JSONResponse({"error": {"message": "secret of the account"}}, int(asked))

        async with elsewhere(refuses) as there, running(model_directory, wait=False, models=models(there.url)) as here:
            for status, (ours, code) in answers.items():
                response = await here.complete(user=str(status))
                assert (response.status_code, response.json()["error"]["code"]) == (ours, code)
                assert int(response.headers["retry-after"]) >= 1 and "secret" not in response.text
            passed = await here.complete(user="400")
            assert passed.status_code == 400 and "secret of the account" in passed.text
        async with running(model_directory, wait=False, models=models(there.url)) as here:
            response = await here.complete()
            assert response.status_code == 502 and "cannot be reached" in response.text

    asyncio.run(main())


def test_a_stream_that_breaks_there_ends_with_an_error(model_directory: Path) -> None:
    async def breaks(request: Request) -> Response:
        del request

        async def parts() -> AsyncIterator[bytes]:
            yield b'data: {"choices": []}\n\ndata: {"cho'
            raise ConnectionResetError

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def main() -> None:
        async with elsewhere(breaks) as there, running(model_directory, wait=False, models=models(there.url)) as here:
            response = await here.complete(stream=True)
            *events, end = response.text.split("\n\n")
            shown = [json.loads(event.strip().removeprefix("data: ")) for event in events if event.strip()]
            assert shown[0] == {"choices": []} and shown[-1]["error"]["code"] == "upstream_failed" and end == ""
            assert "[DONE]" not in response.text

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_upstreams_request(model_directory: Path, stream: bool) -> None:
    async def main() -> None:
        asked, left = asyncio.Event(), asyncio.Event()

        async def never(request: Request) -> Response:
            if not stream:
                asked.set()
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                left.set()
                return Response()

            async def parts() -> AsyncIterator[bytes]:
                try:
                    yield b"data: {}\n\n"
                    asked.set()
                    await asyncio.Event().wait()
                finally:
                    left.set()

            return StreamingResponse(parts(), media_type="text/event-stream")

        async with elsewhere(never) as there, running(model_directory, wait=False, models=models(there.url)) as here:
            waiting = asyncio.create_task(here.complete(stream=stream))
            async with asyncio.timeout(30):
                await asked.wait()
                waiting.cancel()
                await left.wait()
                await here.router._admission.idle()

    asyncio.run(main())


def test_a_router_that_shuts_down_sends_nothing_on(model_directory: Path) -> None:
    async def main() -> None:
        async with (
            elsewhere(says_theirs) as there,
            running(model_directory, wait=False, models=models(there.url)) as here,
        ):
            await here.router.drain()
            assert (await here.complete()).status_code == 503
            assert not there.bodies

    asyncio.run(main())


def test_a_missing_key_file_stops_the_start(model_directory: Path, tmp_path: Path) -> None:
    async def main() -> None:
        settings = models("http://h/v1", api_key_file=str(tmp_path / "none"))
        async with running(model_directory, wait=False, models=settings):
            raise AssertionError

    with pytest.raises(Exception, match="cannot be read"):
        asyncio.run(main())
