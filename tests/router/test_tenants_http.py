"""Keys, classes and deadlines at both doors."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
import yaml
from fake_worker import STOP, FakeDecodeWorker, is_silent, output, says
from router_rig import Rig, running, tokens_of

from baton.client import Client
from baton.cluster.redis_server import EmbeddedRedis
from baton.errors import Overloaded, Unauthorized
from baton.rpc import inference_pb2, inference_pb2_grpc
from router.admission.admission import Admission, Turn, TurnRequest

ACME, BETA = "sk-acme-0123456789abcdef", "sk-beta-0123456789abcdef"
TENANTS: dict[str, dict[str, Any]] = {
    "acme": {"classes": ["standard", "batch"], "context_length_max": 40},
    "beta": {"models": ["m"], "requests_max": 1},
}


def tenants_file(directory: Path, **changes: dict[str, Any]) -> Path:
    keys = {"acme": ACME, "beta": BETA}
    tenants = [
        {
            "name": name,
            "api_keys_sha256": [hashlib.sha256(keys[name].encode()).hexdigest()],
            **terms,
            **changes.get(name, {}),
        }
        for name, terms in TENANTS.items()
    ]
    file = directory / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    return file


def speaker(directory: Path, text: str = "hi") -> FakeDecodeWorker:
    return FakeDecodeWorker(says([*map(output, tokens_of(directory, text)), output(0, finish=STOP)]))


@asynccontextmanager
async def guarded(
    directory: Path, tmp_path: Path, redis: EmbeddedRedis, prefix: str, *workers: FakeDecodeWorker, **settings: Any
) -> AsyncIterator[Rig]:
    settings = {"tenants_file": tenants_file(tmp_path), "key_prefix": prefix} | settings
    async with running(directory, *workers, redis_url=redis.url, **settings) as rig:
        yield rig


async def ask(rig: Rig, key: str | None = ACME, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    given = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": "m", "prompt": "hello"} | fields
    return await rig.http.post("/v1/completions", json=body, headers=given | (headers or {}))


class Turns:
    """Notes what turns are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[TurnRequest] = []
        self.used: list[int] = []
        turn, close = Admission.turn, Turn.close

        async def noted(admission: Admission, request: TurnRequest) -> Turn:
            self.asked.append(request)
            return await turn(admission, request)

        def noted_close(over: Turn, used_tokens: int) -> None:
            self.used.append(used_tokens)
            close(over, used_tokens)

        monkeypatch.setattr(Admission, "turn", noted)
        monkeypatch.setattr(Turn, "close", noted_close)


def test_nothing_but_health_and_metrics_opens_without_a_key(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, speaker(model_directory)) as rig:
            for path in ("/v1/models", "/v1/models/m", "/v1/workers", "/v1/decisions/x"):
                response = await rig.http.get(path)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
                allowed = await rig.http.get(path, headers={"authorization": f"Bearer {ACME}"})
                assert allowed.status_code == (404 if "decisions" in path else 200)
            for path in ("/health", "/metrics", "/openapi.json"):
                assert (await rig.http.get(path)).status_code == 200
            for key in (None, "sk-wrong-0123456789abcdef", "ü"):
                headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
                response = await rig.http.post("/v1/completions", content=b"{", headers=headers)
                assert response.status_code == 401, "before the body is looked at"
                assert "sk-wrong" not in response.text
            assert (await ask(rig)).status_code == (await ask(rig, BETA)).status_code == 200

    asyncio.run(main())


def test_the_openai_client_knows_what_a_wrong_key_is(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, worker) as rig:
            for key, is_known in ((ACME, True), ("sk-wrong-0123456789abcdef", False)):
                async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=key, max_retries=0) as client:
                    if is_known:
                        messages: Any = [{"role": "user", "content": "a"}]
                        answer = await client.chat.completions.create(model="m", messages=messages, service_tier="flex")
                        assert answer.choices[0].message.content == "hi"
                    else:
                        with pytest.raises(openai.AuthenticationError):
                            await client.completions.create(model="m", prompt="a")

    asyncio.run(main())


def test_class_and_deadline_reach_admission(
    model_directory: Path,
    tmp_path: Path,
    redis_server: EmbeddedRedis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = Turns(monkeypatch)

    async def main() -> None:
        worker = speaker(model_directory)
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, worker) as rig:
            cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
                ({}, {}, "standard"),
                ({}, {"service_tier": "auto"}, "standard"),
                ({}, {"service_tier": "flex"}, "batch"),
                ({"x-baton-class": "Batch"}, {"service_tier": "default"}, "batch"),
            ]
            for headers, fields, request_class in cases:
                response = await ask(rig, headers=headers, **fields)
                assert response.status_code == 200
                asked = turns.asked.pop()
                assert (asked.tenant.name, asked.model, asked.request_class) == ("acme", "m", request_class)
                assert asked.deadline_s is None
                usage = response.json()["usage"]
                assert (asked.prompt_tokens, asked.max_tokens) == (usage["prompt_tokens"], 16)
                assert turns.used.pop() == usage["total_tokens"], "what was used, and not what was asked for"
            await ask(rig, BETA, {"x-baton-class": "interactive", "x-baton-deadline-s": "30"}, n=2, prompt=["a", "bc"])
            asked = turns.asked.pop()
            assert (asked.request_class, asked.sequences) == ("interactive", 4)
            assert asked.deadline_s is not None

    asyncio.run(main())


BAD_TERMS: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"x-baton-class": "urgent"}, {}, "x-baton-class"),
    ({"x-baton-class": ""}, {}, "x-baton-class"),
    ({"x-baton-deadline-s": "soon"}, {}, "x-baton-deadline-s"),
    ({"x-baton-deadline-s": "0"}, {}, "x-baton-deadline-s"),
    ({"x-baton-deadline-s": "-1"}, {}, "x-baton-deadline-s"),
    ({"x-baton-deadline-s": "nan"}, {}, "x-baton-deadline-s"),
    ({"x-baton-deadline-s": "inf"}, {}, "x-baton-deadline-s"),
    ({}, {"service_tier": "gold"}, "service_tier"),
    ({}, {"service_tier": 3}, "service_tier"),
]


def test_bad_terms_are_named(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with running(model_directory, worker) as rig:
            for headers, fields, param in BAD_TERMS:
                response = await ask(rig, None, headers, **fields)
                assert (response.status_code, response.json()["error"]["param"]) == (400, param), (headers, fields)
            assert not worker.submits

    asyncio.run(main())


def test_what_a_tenant_may_not_is_refused_with_the_numbers(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        models = [{"name": "m", "model": "x"}, {"name": "secret", "model": "x"}]
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, worker, models=models) as rig:
            forbidden = await ask(rig, headers={"x-baton-class": "interactive"})
            assert forbidden.status_code == 400 and "standard, batch" in forbidden.json()["error"]["message"]
            too_long = await ask(rig, prompt=[5] * 30, max_tokens=11)
            message = too_long.json()["error"]["message"]
            assert too_long.status_code == 400
            assert "41 tokens" in message and "the context of this API key is 40 tokens" in message
            assert (await ask(rig, BETA, prompt=[5] * 30, max_tokens=11)).status_code == 200
            hidden = await ask(rig, BETA, model="secret")
            assert hidden.status_code == 404 and "'m'" in hidden.json()["error"]["message"]
            listed = await rig.http.get("/v1/models", headers={"authorization": f"Bearer {BETA}"})
            assert [card["id"] for card in listed.json()["data"]] == ["m"]
            body = {"prompt": "hello"}
            only = await rig.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {BETA}"})
            assert only.status_code == 200, "the only one that it may use"

    asyncio.run(main())


def test_tenants_have_caches_of_their_own(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, worker) as rig:
            for key, salt in ((ACME, ""), (BETA, ""), (ACME, "s"), (BETA, "s"), (ACME, "beta")):
                assert (await ask(rig, key, cache_salt=salt)).status_code == 200
            salts = [submit.cache_salt for submit in worker.submits]
            assert len(set(salts)) == 5 and "" not in salts

    asyncio.run(main())


def is_told_to_come_back(address: str) -> None:
    with Client(address, api_key=BETA) as client, pytest.raises(Overloaded) as caught:
        list(client.generate("m", "a"))
    assert caught.value.retry_after_s == 7


def test_a_tenants_limits_say_when_to_come_back(
    model_directory: Path,
    tmp_path: Path,
    redis_server: EmbeddedRedis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.admission.admission.RETRY_AFTER_S", 6.2)

    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, worker) as rig:
            waiting = asyncio.create_task(ask(rig, BETA))
            await worker.until(lambda worker: bool(worker.submits))
            refused = await ask(rig, BETA)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            async with grpc.aio.insecure_channel(rig.router.grpc_address) as channel:
                call = inference_pb2_grpc.InferenceStub(channel).Generate(
                    inference_pb2.GenerateRequest(text="a"), metadata=(("authorization", f"Bearer {BETA}"),)
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert ("retry-after", "7") in list(caught.value.trailing_metadata() or ())
            await asyncio.to_thread(is_told_to_come_back, rig.router.grpc_address)
            waiting.cancel()
            await worker.until(lambda worker: bool(worker.cancels))
            worker.script = says([output(0, finish=STOP)])
            assert (await ask(rig, BETA)).status_code == 200, "its place was given back"

    asyncio.run(main())


def test_a_deadline_ends_what_runs(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with running(model_directory, worker) as rig:
            response = await ask(rig, None, {"x-baton-deadline-s": "0.05"})
            assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
            await worker.until(lambda worker: bool(worker.cancels))

    asyncio.run(main())


def test_who_waits_for_its_turn_leaves_with_its_client_or_at_the_drain(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(monkeypatch)

    async def asked(count: int) -> None:
        async with asyncio.timeout(30):
            while len(turns.asked) < count:  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def main() -> None:
        worker = speaker(model_directory)
        async with running(model_directory, worker) as rig:
            monkeypatch.setattr(rig.router._admission, "_capacity", Busy())
            leaving, staying = asyncio.create_task(ask(rig, None)), asyncio.create_task(ask(rig, None, stream=True))
            await asked(2)
            leaving.cancel()
            async with asyncio.timeout(30):
                while rig.router._admission.waiting != 1:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await rig.router.drain()
            response = await staying
            assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]
            assert rig.router._admission.in_flight == 0 and not worker.submits

    asyncio.run(main())


class Busy:
    """Workers that have enough to do."""

    def queue_s(self, model: str) -> float:
        del model
        return 100.0


def test_the_python_client_sends_key_and_class(
    model_directory: Path,
    tmp_path: Path,
    redis_server: EmbeddedRedis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = Turns(monkeypatch)

    def calls(address: str) -> None:
        with Client(address) as stranger, pytest.raises(Unauthorized):
            stranger.models()
        with Client(address, api_key=ACME) as client:
            assert [model.name for model in client.models()] == ["m"]
            assert "".join(part.text for part in client.generate("m", "a", request_class="batch")) == "hi"

    async def main() -> None:
        worker = speaker(model_directory)
        async with guarded(model_directory, tmp_path, redis_server, key_prefix, worker) as rig:
            await asyncio.to_thread(calls, rig.router.grpc_address)
            assert [asked.request_class for asked in turns.asked] == ["batch"]

    asyncio.run(main())


def test_the_grpc_door_takes_keys_classes_and_deadlines(
    model_directory: Path,
    tmp_path: Path,
    redis_server: EmbeddedRedis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = Turns(monkeypatch)

    async def main() -> None:
        worker = speaker(model_directory)
        async with (
            guarded(model_directory, tmp_path, redis_server, key_prefix, worker) as rig,
            grpc.aio.insecure_channel(rig.router.grpc_address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(text="a", request_class="REQUEST_CLASS_BATCH")
            for call in (stub.ListModels(inference_pb2.ListModelsRequest()), stub.Generate(request).read()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert not turns.asked
            key = (("authorization", f"Bearer {ACME}"),)
            assert [part async for part in stub.Generate(request, metadata=key, timeout=30)]
            (asked,) = turns.asked
            assert (asked.tenant.name, asked.request_class) == ("acme", "batch") and asked.deadline_s is not None
            unknown = inference_pb2.GenerateRequest(text="a", request_class=77)  # type: ignore[arg-type]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(unknown, metadata=key).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=key)).models[0].name == "m"

    asyncio.run(main())
