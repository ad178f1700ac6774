import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_worker import LENGTH, STOP, FakeDecodeWorker, failure, is_silent, output, says
from router_rig import running, tokens_of

from baton.rpc import common_pb2, worker_pb2

EOS = 0


def speaker(directory: Path, text: str, **last: Any) -> FakeDecodeWorker:
    """Says the text a token a step, then ends the sequence."""
    tokens = tokens_of(directory, text)
    return FakeDecodeWorker(says([*map(output, tokens), output(EOS, finish=STOP, **last)]))


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-1] == "" and all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(data) if data != "[DONE]" else data for data in (block[6:] for block in blocks[:-1])]


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_a_completion(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "wörld 😀", cached_tokens=2)) as rig:
            response = await rig.complete(max_tokens=50, temperature=0)
            body = response.json()
            assert response.status_code == 200
            assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "m", "cmpl-")
            (choice,) = body["choices"]
            assert (choice["text"], choice["finish_reason"], choice["index"]) == ("wörld 😀", "stop", 0)
            prompt, completion = (
                len(tokens_of(model_directory, "hello")),
                len(tokens_of(model_directory, "wörld 😀")) + 1,
            )
            assert body["usage"] == {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": 2},
            }

    asyncio.run(main())


def test_a_streamed_completion_is_the_same_text_in_openais_events(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "wörld 😀")) as rig:
            *chunks, usage, done = events(await rig.complete(stream=True, stream_options={"include_usage": True}))
            assert done == "[DONE]"
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "wörld 😀"
            assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
            assert all(chunk["usage"] is None for chunk in chunks)
            assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
            assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1

    asyncio.run(main())


def test_continuous_usage_counts_up(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "abc")) as rig:
            options = {"include_usage": True, "continuous_usage_stats": True}
            *chunks, _usage, _done = events(await rig.complete(stream=True, stream_options=options))
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts) and counts[0] == 1

    asyncio.run(main())


def test_a_streamed_chat_opens_with_the_role(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "hi there")) as rig:
            first, *chunks, done = events(await rig.chat(stream=True))
            assert done == "[DONE]" and first["object"] == "chat.completion.chunk"
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hi there"
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            assert "usage" not in first

    asyncio.run(main())


def test_what_reaches_the_worker(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with running(model_directory, worker) as rig:
            fields = {
                "temperature": 0.5,
                "top_k": 7,
                "stop_token_ids": [5],
                "logit_bias": {"3": -1},
                "ignore_eos": True,
            }
            await rig.complete(max_tokens=9, min_tokens=2, seed=-1, cache_salt="s", **fields)
            await rig.complete()
            first, second = worker.submits
            sampling = first.sampling
            assert list(first.prompt) == tokens_of(model_directory, "hello")
            assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.min_tokens) == (0.5, 7, 9, 2)
            assert (sampling.seed, first.cache_salt, dict(sampling.logit_bias)) == (2**64 - 1, "s", {3: -1.0})
            assert list(sampling.stop_token_ids) == [5] and sampling.ignore_eos
            assert second.sampling.HasField("seed"), "drawn, so that a retry gives the same tokens"
            assert second.sampling.max_tokens == 16

    asyncio.run(main())


def test_chat_goes_through_the_template_and_may_use_the_rest_of_the_context(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with running(model_directory, worker) as rig:
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
            await rig.chat(messages=messages, chat_template_kwargs={"shout": True})
            (submit,) = worker.submits
            assert list(submit.prompt) == tokens_of(model_directory, "<system>s</><user>a\nb</><assistant>!")
            assert submit.sampling.max_tokens == 1000 - len(submit.prompt)

    asyncio.run(main())


def test_several_prompts_and_choices_are_sequences_of_their_own(model_directory: Path) -> None:
    async def main() -> None:
        async def echoes_seed(submit: worker_pb2.Submit) -> Any:
            yield output(*submit.prompt, submit.sampling.seed % 256, finish=LENGTH)

        worker = FakeDecodeWorker(echoes_seed)
        async with running(model_directory, worker) as rig:
            body = (await rig.complete(prompt=[[5, 6], [7]], n=2, seed=10, return_token_ids=True)).json()
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
            assert [choice["token_ids"] for choice in body["choices"]] == [[5, 6, 10], [5, 6, 11], [7, 10], [7, 11]]
            assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[5, 6], [5, 6], [7], [7]]
            assert body["usage"]["prompt_tokens"] == 3
            assert len({submit.request_id for submit in worker.submits}) == 4

    asyncio.run(main())


def test_token_ids_are_streamed_even_while_their_text_is_held_back(model_directory: Path) -> None:
    async def main() -> None:
        tokens = tokens_of(model_directory, "😀")
        async with running(model_directory, speaker(model_directory, "😀")) as rig:
            *chunks, _done = events(await rig.complete(stream=True, return_token_ids=True))
            choices = [chunk["choices"][0] for chunk in chunks]
            assert [token for choice in choices for token in choice["token_ids"]] == [*tokens, EOS]
            assert choices[0]["prompt_token_ids"] == tokens_of(model_directory, "hello")
            assert "prompt_token_ids" not in choices[1]
            body = (await rig.chat(return_token_ids=True)).json()
            assert body["choices"][0]["token_ids"] == [*tokens, EOS]
            assert body["prompt_token_ids"] == tokens_of(model_directory, "<user>hello</><assistant>")

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_cancels_the_request(model_directory: Path, stream: bool) -> None:
    async def main() -> None:
        tokens = tokens_of(model_directory, "one two three")

        async def script(submit: worker_pb2.Submit) -> Any:
            del submit
            for token in tokens:
                yield output(token)
            await asyncio.Event().wait()

        worker = FakeDecodeWorker(script)
        async with running(model_directory, worker) as rig:
            response = await rig.complete(stop=["never", " two"], max_tokens=100, stream=stream)
            choices = [event["choices"][0] for event in (events(response)[:-1] if stream else [response.json()])]
            assert "".join(choice["text"] for choice in choices) == "one"
            assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", " two")
            await worker.until(lambda worker: bool(worker.cancels))
            assert worker.cancels == [worker.submits[0].request_id]

    asyncio.run(main())


def test_stop_strings_wait_for_min_tokens(model_directory: Path) -> None:
    async def main() -> None:
        tokens = tokens_of(model_directory, "a.b.c.d")
        async with running(model_directory, FakeDecodeWorker(says([output(*tokens, finish=LENGTH)]))) as rig:
            body = (await rig.complete(stop=".", min_tokens=3, include_stop_str_in_output=True)).json()
            assert body["choices"][0]["text"] == "a.b."

    asyncio.run(main())


def test_logprobs_and_echo_of_a_completion(model_directory: Path) -> None:
    def position(*pairs: tuple[int, float]) -> common_pb2.PositionLogprobs:
        tokens = [common_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in pairs]
        return common_pb2.PositionLogprobs(tokens=tokens)

    async def main() -> None:
        a, b, c = (tokens_of(model_directory, letter)[0] for letter in "abc")
        first = output(
            b,
            logprobs=[position((b, -0.5), (c, -0.25))],
            prompt_logprobs=[position(), position((a, -2), (b, float("-inf")))],
        )
        second = output(c, finish=LENGTH, logprobs=[position((c, -1))])
        async with running(model_directory, FakeDecodeWorker(says([first, second]))) as rig:
            asked = {"prompt": [a, a], "logprobs": 1, "echo": True}
            whole = (await rig.complete(**asked)).json()["choices"][0]
            assert whole["text"] == "aabc"
            assert whole["logprobs"] == {
                "text_offset": [0, 1, 2, 3],
                "tokens": ["a", "a", "b", "c"],
                "token_logprobs": [None, -2, -0.5, -1],
                "top_logprobs": [None, {"a": -2, "b": -9999.0}, {"b": -0.5, "c": -0.25}, {"c": -1}],
            }
            *chunks, _done = events(await rig.complete(stream=True, **asked))
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "aabc"
            assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0, 1, 2], [3]]
            scored = (await rig.complete(max_tokens=0, **asked)).json()
            assert scored["choices"][0]["text"] == "aa" and scored["usage"]["completion_tokens"] == 0
            assert scored["choices"][0]["logprobs"]["tokens"] == ["a", "a"]

    asyncio.run(main())


def test_logprobs_of_a_chat(model_directory: Path) -> None:
    async def main() -> None:
        a, b, c = (tokens_of(model_directory, letter)[0] for letter in "abc")
        tokens = [common_pb2.TokenLogprob(token_id=token, logprob=p) for token, p in ((b, -3), (a, -1), (c, -2))]
        only = output(b, finish=LENGTH, logprobs=[common_pb2.PositionLogprobs(tokens=tokens)])
        worker = FakeDecodeWorker(says([only]))
        async with running(model_directory, worker) as rig:
            body = (await rig.chat(logprobs=True, top_logprobs=2)).json()
            (entry,) = body["choices"][0]["logprobs"]["content"]
            assert (entry["token"], entry["logprob"], entry["bytes"]) == ("b", -3, [98])
            assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [("a", -1), ("c", -2)]
            assert worker.submits[0].sampling.logprobs == 2

    asyncio.run(main())


def test_the_timeline_comes_when_asked_for(model_directory: Path) -> None:
    async def main() -> None:
        timeline = common_pb2.Timeline(prefill_s=0.5, transfer_bytes=2**40, transport="shm")
        async with running(model_directory, speaker(model_directory, "x", timeline=timeline)) as rig:
            assert "timeline" not in (await rig.complete()).json()
            whole = (await rig.complete(timeline=True)).json()["timeline"]
            assert (whole["prefill_s"], whole["transfer_bytes"], whole["transport"]) == (0.5, 2**40, "shm")
            last = events(await rig.chat(timeline=True, stream=True))[-2]
            assert last["timeline"] == whole
            options = {"include_usage": True}
            last = events(await rig.chat(timeline=True, stream=True, stream_options=options))[-2]
            assert last["timeline"] == whole and last["choices"] == []

    asyncio.run(main())


BAD_COMPLETIONS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other"}, 404, "model"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [400]}, 400, "prompt"),
    ({"prompt": [2**80]}, 400, "prompt"),
    ({"prompt": [1] * 1000}, 400, "prompt"),
    ({"prompt": "x" * 9000}, 400, "prompt"),
    ({"max_tokens": 1000}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "9"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 10**40}, 400, "max_tokens"),
    ({"min_tokens": 17}, 400, "min_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": 2**40}, 400, "top_k"),
    ({"n": 0}, 400, "n"),
    ({"n": 2, "best_of": 3}, 400, "best_of"),
    ({"seed": 2**64}, 400, "seed"),
    ({"seed": -(2**63) - 1}, 400, "seed"),
    ({"stream": 1}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"400": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"3": 101}}, 400, "logit_bias"),
    ({"stop_token_ids": [400]}, 400, "stop_token_ids"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"return_token_ids": "yes"}, 400, "return_token_ids"),
]
BAD_CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "pirate", "content": "x"}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"max_completion_tokens": 1000}, "max_tokens"),
]


def test_bad_values_get_a_4xx_that_names_the_field(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with running(model_directory, worker) as rig:
            for fields, status, param in BAD_COMPLETIONS:
                response = await rig.complete(**fields)
                error = error_of(response)
                assert (response.status_code, error["param"]) == (status, param), (fields, error)
                assert error["type"] == "invalid_request_error" and error["message"].endswith(".")
            for fields, param in BAD_CHATS:
                response = await rig.chat(**fields)
                assert (response.status_code, error_of(response)["param"]) == (400, param), fields
            assert worker.submits == []
            assert error_of(await rig.complete(model="other"))["code"] == "model_not_found"
            message = error_of(await rig.complete(prompt=[1] * 990, max_tokens=11))["message"]
            assert "1000" in message and "1001" in message and "990" in message
            assert (await rig.complete()).status_code == 200

    asyncio.run(main())


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b'{"model": "m"}',
    b'{"model": "m", "prompt": "\xff"}',
    b'{"model": "m", "prompt": "\\ud800"}',
    b'{"model": "m", "prompt": "a", "temperature": NaN}',
    b'{"model": "m", "prompt": "a", "temperature": Infinity}',
    b'{"model": "m", "prompt": "a", "temperature": 1e999}',
    b'{"model": "m", "prompt": ' + b"[" * 100_000,
    b'{"model": "m", "prompt": "a"} trailing',
]


def test_bad_bodies_get_a_400_and_the_server_lives(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x")) as rig:
            for body in BAD_BODIES:
                response = await rig.http.post("/v1/completions", content=body)
                assert response.status_code == 400, body[:60]
                assert error_of(response)["message"]
            assert (await rig.complete()).status_code == 200

    asyncio.run(main())


def test_error_messages_do_not_repeat_what_was_sent(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x")) as rig:
            secret = "hunter2"
            for fields in (
                {"prompt": [secret, 1]},
                {"stop": {"a": secret}},
                {"temperature": secret},
                {"prompt": secret * 2000},
            ):
                assert secret not in (await rig.complete(**fields)).text
            assert secret not in (await rig.http.post("/v1/completions", content=b'{"prompt": "hunter2')).text

    asyncio.run(main())


def test_unknown_fields_and_nulls_are_ignored(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x")) as rig:
            assert (await rig.complete(no_such_field={"a": 1}, temperature=None, stop=None, n=None)).status_code == 200
            assert (await rig.chat(tools=None, user="u", response_format={"type": "text"})).status_code == 200

    asyncio.run(main())


def test_too_large_a_body_is_a_413_declared_or_not(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x"), body_bytes_max=10_000) as rig:
            body = json.dumps({"model": "m", "prompt": "x" * 20_000}).encode()

            async def in_pieces() -> Any:
                for start in range(0, len(body), 1000):
                    yield body[start : start + 1000]

            for content in (body, in_pieces()):
                response = await rig.http.post("/v1/completions", content=content)
                assert response.status_code == 413
                assert "10000 bytes" in error_of(response)["message"]

    asyncio.run(main())


def test_ten_megabytes_of_text_are_refused_while_others_are_served(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x")) as rig:
            large, small = await asyncio.gather(rig.complete(prompt="hello " * 1_750_000), rig.complete())
            assert (large.status_code, small.status_code) == (400, 200)
            assert "10500000 bytes" in error_of(large)["message"]

    asyncio.run(main())


def test_unknown_routes_and_methods_are_shaped_like_every_error(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x")) as rig:
            unknown, method = await rig.http.get("/v1/nothing"), await rig.http.get("/v1/completions")
            assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
            assert (method.status_code, method.headers["allow"]) == (405, "POST")
            assert "does not take GET" in error_of(method)["message"]

    asyncio.run(main())


def test_every_response_has_a_request_id(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with running(model_directory, worker) as rig:
            for given, is_taken in (("my-id.1", True), ("no good", False), ("x" * 200, False)):
                response = await rig.http.get("/v1/nothing", headers={"x-request-id": given})
                assert (response.headers["x-baton-request-id"] == given) is is_taken
            body = {"model": "m", "prompt": "a"}
            response = await rig.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
            assert response.json()["id"] == "cmpl-mine"
            assert worker.submits[0].request_id.startswith("mine-0-")

    asyncio.run(main())


def test_past_the_bound_requests_are_told_to_come_back(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with running(model_directory, worker, requests_max=2) as rig:
            waiting = [asyncio.create_task(rig.complete()) for _ in range(2)]
            await worker.until(lambda worker: len(worker.submits) == 2)
            response = await rig.complete()
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert error_of(response)["code"] == "overloaded"
            for task in waiting:
                task.cancel()
            await worker.until(lambda worker: len(worker.cancels) == 2)
            worker.script = says([output(EOS, finish=STOP)])
            assert (await rig.complete(n=3)).status_code == 400, "there will never be three places"
            assert (await rig.complete(n=2)).status_code == 200, "the places were given back"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_started", [False, True])
def test_a_client_that_leaves_cancels_its_request_at_once(
    model_directory: Path, stream: bool, has_started: bool
) -> None:
    async def script(submit: worker_pb2.Submit) -> Any:
        if has_started:
            yield output(*submit.prompt)
        await asyncio.Event().wait()
        yield output()

    async def main() -> None:
        worker = FakeDecodeWorker(script)
        async with running(model_directory, worker) as rig:
            body = {"model": "m", "prompt": "a", "stream": stream}
            reader, writer = await asyncio.open_connection(*rig.router.http_address.split(":"))
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            await worker.until(lambda worker: bool(worker.submits))
            if stream and has_started:
                await reader.readuntil(b"data: ")
            writer.close()
            await worker.until(lambda worker: bool(worker.cancels))
            assert worker.cancels == [worker.submits[0].request_id]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (worker_pb2.ERROR_KIND_INVALID_REQUEST, 400),
        (worker_pb2.ERROR_KIND_OVERLOADED, 429),
        (worker_pb2.ERROR_KIND_UNAVAILABLE, 503),
        (worker_pb2.ERROR_KIND_INTERNAL, 500),
    ],
)
def test_a_workers_error_before_the_first_token_has_its_status_even_in_a_stream(
    model_directory: Path, kind: int, status: int
) -> None:
    async def main() -> None:
        async with running(model_directory, FakeDecodeWorker(says([failure(kind)]))) as rig:
            for stream in (False, True):
                response = await rig.complete(stream=stream)
                assert response.status_code == status
                assert error_of(response)["message"] == "It went wrong."

    asyncio.run(main())


def test_an_error_in_a_started_stream_is_its_last_event(model_directory: Path) -> None:
    async def main() -> None:
        outputs = [output(*tokens_of(model_directory, "a")), failure(worker_pb2.ERROR_KIND_INTERNAL)]
        async with running(model_directory, FakeDecodeWorker(says(outputs))) as rig:
            response = await rig.complete(stream=True)
            *_chunks, last = events(response)
            assert response.status_code == 200
            assert last["error"]["type"] == "server_error"

    asyncio.run(main())


def test_a_request_that_takes_too_long_is_ended(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with running(model_directory, worker, request_timeout_s=1.0) as rig:
            response = await rig.complete()
            assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
            await worker.until(lambda worker: bool(worker.cancels))

    asyncio.run(main())


def test_models_and_health_and_workers_without_and_with_a_worker(model_directory: Path) -> None:
    async def main() -> None:
        worker = speaker(model_directory, "x")
        async with running(model_directory, wait=False) as rig, worker:
            assert (await rig.http.get("/health")).status_code == 503
            assert "no decode worker" in (await rig.http.get("/health")).json()["reason"]
            assert (await rig.complete()).status_code == 503
            rig.membership.change([worker.info])
            await rig.router.ready()
            health = (await rig.http.get("/health")).json()
            assert (health["status"], health["warm"], health["models"]) == ("ok", True, {"m": {"ready": True}})
            assert not health["index"]["fresh"], "without Redis it knows of the caches what it itself sent there"
            assert health["queue"] == {"waiting": 0, "in_flight": 0}
            (card,) = (await rig.http.get("/v1/models")).json()["data"]
            assert (card["id"], card["max_model_len"]) == ("m", 1000)
            assert (await rig.http.get("/v1/models/m")).json() == card
            assert (await rig.http.get("/v1/models/no/such")).status_code == 404

            gone = worker.info.model_copy(update={"worker_id": "decode-9", "address": "127.0.0.1:1"})
            rig.membership.change([worker.info, gone])
            here, lost = (await rig.http.get("/v1/workers")).json()["data"]
            assert (here["worker_id"], here["reachable"], here["kv_blocks_used"]) == ("decode-1", True, 7)
            assert (lost["worker_id"], lost["reachable"]) == ("decode-9", False)
            assert lost["error"]

    asyncio.run(main())


def test_metrics_tell_what_happened(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "ab", cached_tokens=1)) as rig:
            await rig.complete()
            await rig.complete(model="other")
            tokens = len(tokens_of(model_directory, "ab")) + 1
            labels = {"model": "m", "protocol": "http", "endpoint": "/v1/completions"}
            assert rig.metric("baton_requests_total", code="200", **labels) == 1
            assert rig.metric("baton_requests_total", code="404", **labels | {"model": ""}) == 1
            assert rig.metric("baton_generation_tokens_total", model="m") == tokens
            assert rig.metric("baton_cached_tokens_total", model="m") == 1
            assert rig.metric("baton_time_to_first_token_seconds_count", model="m") == 1
            assert rig.metric("baton_inter_token_latency_seconds_count", model="m") == tokens - 1
            assert rig.metric("baton_e2e_request_latency_seconds_count", model="m") == 1
            for gauge in ("running", "waiting"):
                assert rig.metric(f"baton_requests_{gauge}", model="m") == 0
            text = (await rig.http.get("/metrics")).text
            assert (
                'baton_worker_kv_cache_usage_ratio{model="m",pool="default",role="decode",worker="decode-1"} 0.0'
                in text
            )

    asyncio.run(main())


def test_the_description_covers_requests_and_responses(model_directory: Path) -> None:
    async def main() -> None:
        async with running(model_directory, speaker(model_directory, "x")) as rig:
            description = (await rig.http.get("/openapi.json")).json()
            schemas = description["components"]["schemas"]
            assert "prompt" in schemas["CompletionRequest"]["properties"]
            assert "choices" in schemas["ChatCompletion"]["properties"]
            references = {part.split('"')[0] for part in json.dumps(description).split("#/components/schemas/")[1:]}
            assert references <= schemas.keys()

    asyncio.run(main())


def test_a_bug_of_ours_is_a_shaped_500_that_tells_nothing(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter2"

    def fail(*_: object) -> None:
        raise ZeroDivisionError(secret)

    async def main(rig_worker: FakeDecodeWorker) -> None:
        async with running(model_directory, rig_worker) as rig:
            monkeypatch.setattr("router.catalog.Catalog.find", fail)
            response = await rig.complete()
            assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
            assert (await rig.http.get("/health")).status_code == 200

    asyncio.run(main(speaker(model_directory, "x")))
    assert "ZeroDivisionError" in caplog.text and secret not in caplog.text


def test_drain_refuses_the_new_and_finishes_the_old(model_directory: Path) -> None:
    release = asyncio.Event()

    async def script(submit: worker_pb2.Submit) -> Any:
        del submit
        await release.wait()
        yield output(EOS, finish=STOP)

    async def main() -> None:
        worker = FakeDecodeWorker(script)
        async with running(model_directory, worker, drain_timeout_s=60) as rig:
            running_one = asyncio.create_task(rig.complete())
            await worker.until(lambda worker: bool(worker.submits))
            draining = asyncio.create_task(rig.router.drain())
            while (await rig.http.get("/health")).status_code == 200:  # noqa: ASYNC110 - until the drain has begun
                await asyncio.sleep(0)
            assert (await rig.complete()).status_code == 503
            release.set()
            await draining
            assert (await running_one).status_code == 200

    asyncio.run(main())
