"""The real `openai` package, unchanged, against the router."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_worker import STOP, FakeDecodeWorker, is_silent, output, says
from router_rig import Rig, running, tokens_of

from baton.rpc import worker_pb2

TEXT = "你好 wörld 😀 done"


def speaker(directory: Path) -> FakeDecodeWorker:
    return FakeDecodeWorker(says([*map(output, tokens_of(directory, TEXT)), output(0, finish=STOP, cached_tokens=1)]))


def client_of(rig: Rig) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0)


def test_completions_and_chat_whole_and_streamed(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory)) as rig, client_of(rig) as client:
            completion = await client.completions.create(model="m", prompt="hello")
            assert (completion.choices[0].text, completion.choices[0].finish_reason) == (TEXT, "stop")
            parts = [part async for part in await client.completions.create(model="m", prompt="hello", stream=True)]
            assert "".join(part.choices[0].text for part in parts) == TEXT

            messages: Any = [{"role": "user", "content": "hello"}]
            chat = await client.chat.completions.create(model="m", messages=messages)
            assert chat.choices[0].message.content == TEXT and chat.choices[0].message.role == "assistant"
            assert chat.usage is not None and chat.usage.prompt_tokens_details is not None
            assert chat.usage.prompt_tokens_details.cached_tokens == 1
            stream = await client.chat.completions.create(
                model="m", messages=messages, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
            assert chunks[-1].usage == chat.usage
            assert [model.id async for model in client.models.list()] == ["m"]
            assert (await client.models.retrieve("m")).id == "m"

    asyncio.run(main())


def test_the_synchronous_client(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory)) as rig:

            def ask() -> str:
                with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as client:
                    stream = client.completions.create(model="m", prompt="hello", stream=True)
                    return "".join(part.choices[0].text for part in stream)

            assert await asyncio.to_thread(ask) == TEXT

    asyncio.run(main())


def test_errors_are_the_clients_own_types(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory)
        async with running(model_directory, worker, requests_max=1) as rig, client_of(rig) as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="other", prompt="a")
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model="m", prompt="a", temperature=-1)
            assert bad.value.param == "temperature" and bad.value.request_id
            worker.script = is_silent
            waiting = asyncio.create_task(client.completions.create(model="m", prompt="a"))
            await worker.until(lambda worker: bool(worker.submits))
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="m", prompt="a")
            waiting.cancel()
            await worker.until(lambda worker: bool(worker.cancels))
            rig.membership.change([])
            with pytest.raises(openai.InternalServerError, match="No decode worker is ready"):
                await client.completions.create(model="m", prompt="a")

    asyncio.run(main())


def test_an_error_within_a_stream_is_raised(model_directory: Path) -> None:
    async def main() -> None:
        gone = worker_pb2.TokenOutput(finish_reason="FINISH_REASON_ERROR", error="It went wrong.")
        worker = FakeDecodeWorker(says([output(*tokens_of(model_directory, "a")), gone]))
        async with running(model_directory, worker) as rig, client_of(rig) as client:
            stream = await client.completions.create(model="m", prompt="a", stream=True)
            with pytest.raises(openai.APIError, match="It went wrong"):
                [part async for part in stream]

    asyncio.run(main())


def test_a_closed_stream_cancels_the_request(model_directory: Path) -> None:
    async def script(submit: worker_pb2.Submit) -> Any:
        yield output(*submit.prompt)
        await asyncio.Event().wait()

    async def main() -> None:
        worker = FakeDecodeWorker(script)
        async with running(model_directory, worker) as rig, client_of(rig) as client:
            stream = await client.completions.create(model="m", prompt="a", stream=True)
            await anext(aiter(stream))
            await stream.close()
            await worker.until(lambda worker: bool(worker.cancels))

    asyncio.run(main())
