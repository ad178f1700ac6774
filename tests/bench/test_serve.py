"""bench.serve against a server that answers as scripted, over real sockets."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
from scripted_server import Answer, ScriptedServer, event, send_json, send_stream, token_events
from typer import Typer
from typer.testing import CliRunner

from bench import serve
from bench.load import FIRST_TOKEN_ID, Client, Load, Stream
from bench.measure import Completed, Failed, Outcome
from bench.sse import BODY_BYTES_MAX, Endpoint, SSEConnection, StreamError

LOAD = Load(model="m", input_tokens=6, output_tokens=4, shared_prefix_tokens=0, vocabulary=1000)


def streaming(counts: list[int], *, piece_bytes: int = 1 << 20, with_ids: bool = True) -> Answer:
    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        events = token_events(counts, len(request["prompt"]), with_ids=with_ids)
        await send_stream(writer, b"".join(events), piece_bytes)

    return answer


def sending(content: bytes) -> Answer:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await send_stream(writer, content, len(content))

    return answer


def run(
    answer: Answer, *, concurrency: int = 1, requests: int = 1, timeout_s: float = 30
) -> tuple[list[Outcome], ScriptedServer]:
    async def main() -> tuple[list[Outcome], ScriptedServer]:
        async with ScriptedServer(answer) as server:
            endpoint = Endpoint.parse(server.url)
            bodies = islice(LOAD.bodies(random.Random(0)), requests)
            prepared = [endpoint.post("/v1/completions", body) for body in bodies]
            return await Client(endpoint, timeout_s).run(concurrency, prepared, lambda: None), server

    return asyncio.run(main())


def one(answer: Answer, **options: Any) -> Outcome:
    [outcome] = run(answer, **options)[0]
    return outcome


def reason(answer: Answer, **options: Any) -> str:
    outcome = one(answer, **options)
    assert isinstance(outcome, Failed)
    return outcome.reason


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_events_are_read_however_they_are_cut(piece_bytes: int) -> None:
    outcome = one(streaming([1, 3], piece_bytes=piece_bytes))
    assert isinstance(outcome, Completed)
    assert [chunk.tokens for chunk in outcome.chunks] == [1, 3]
    assert (outcome.input_tokens, outcome.output_tokens) == (6, 4)
    assert outcome.start_s < outcome.chunks[0].arrival_s <= outcome.chunks[1].arrival_s <= outcome.end_s


def test_tokens_come_from_usage_where_chunks_have_no_ids() -> None:
    outcome = one(streaming([2, 2], with_ids=False))
    assert isinstance(outcome, Completed)
    assert [chunk.tokens for chunk in outcome.chunks] == [None, None]
    assert len(outcome.token_gaps) == 2


def test_32_streams_run_at_once_on_32_connections() -> None:
    everybody = asyncio.Barrier(32)

    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await everybody.wait()  # none is answered before all are here
        await streaming([1, 1, 1, 1])(request, writer)

    outcomes, server = run(answer, concurrency=32, requests=64)
    assert sum(isinstance(outcome, Completed) for outcome in outcomes) == 64
    assert (server.in_progress_max, server.connections) == (32, 32)
    assert len({tuple(request["prompt"]) for request in server.requests}) == 64


def test_a_connection_that_the_server_closed_is_opened_anew() -> None:
    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await streaming([4])(request, writer)
        writer.close()  # unannounced: the next request may already be on its way

    outcomes, server = run(answer, requests=3)
    assert [type(outcome) for outcome in outcomes] == [Completed] * 3
    assert server.connections == 3


def test_requests_ask_for_exactly_what_is_measured() -> None:
    load = Load(model="m", input_tokens=50, output_tokens=4, shared_prefix_tokens=20, vocabulary=110)
    first, second = islice(load.bodies(random.Random(0)), 2)
    assert first["prompt"][:20] == second["prompt"][:20]
    assert first["prompt"][20:] != second["prompt"][20:]
    assert len(first["prompt"]) == 50
    assert set(first["prompt"]) <= set(range(FIRST_TOKEN_ID, 110))
    assert {key: first[key] for key in ("model", "max_tokens", "temperature", "ignore_eos", "stream")} == {
        "model": "m",
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    assert first["stream_options"] == {"include_usage": True}


def test_an_http_error_is_a_failure_with_its_sentence() -> None:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await send_json(writer, 429, json.dumps({"error": {"message": "Too many requests."}}).encode())

    assert reason(answer) == "HTTP 429: Too many requests."


def test_a_long_error_body_is_cut() -> None:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await send_json(writer, 500, b"x" * (2 * BODY_BYTES_MAX))

    assert reason(answer).startswith("HTTP 500: xxx")
    assert len(reason(answer)) <= 200


def test_an_error_event_is_a_failure() -> None:
    events = [*token_events([1, 1], 6)[:1], event({"error": {"message": "The worker was lost."}}), event("[DONE]")]
    assert reason(sending(b"".join(events))) == "error event: The worker was lost."


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (token_events([1, 1], 6)[:-1], "the stream ended without"),
        ([event("[DONE]")], "the stream ended without"),
        ([*token_events([1, 1], 6)[:1], *token_events([1, 1, 1], 6)], "the stream held other than"),
        ([event("{not json")], "an event of the stream cannot be read: JSONDecodeError"),
        ([event("[1, 2]")], "an event of the stream cannot be read: AttributeError"),
    ],
)
def test_a_stream_that_is_not_whole_is_a_failure(events: list[bytes], expected: str) -> None:
    assert reason(sending(b"".join(events))).startswith(expected)


def test_a_connection_lost_in_the_middle_is_a_failure() -> None:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.close()

    assert reason(answer).startswith("the connection was lost")


def test_what_is_not_http_is_a_failure() -> None:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"+PONG\r\n")

    assert reason(answer).startswith("the answer is not HTTP/1.1")


def test_no_answer_in_time_is_a_failure_and_closes_the_connection() -> None:
    async def main() -> list[Outcome]:
        closed = asyncio.Event()

        async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # until the client closes
            writer.close()
            closed.set()

        async with await asyncio.start_server(keep_silent, "127.0.0.1", 0) as server:
            endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], tls=False, prefix="")
            outcomes = await Client(endpoint, timeout_s=0.05).run(1, [endpoint.post("/", {})], lambda: None)
            await asyncio.wait_for(closed.wait(), 30)
            return outcomes

    assert asyncio.run(main()) == [Failed("no answer within 0.05 s")]


def test_a_closed_connection_takes_no_request() -> None:
    async def main() -> None:
        async with ScriptedServer(streaming([1])) as server:
            connection = await SSEConnection.connect(Endpoint.parse(server.url))
            connection.close()
            with pytest.raises(StreamError):
                await connection.request(b"", Stream())

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:81", Endpoint("h", 81, False, "")),
        ("http://h:81/v1/", Endpoint("h", 81, False, "")),
        ("https://h/proxy/v1", Endpoint("h", 443, True, "/proxy")),
    ],
)
def test_a_url_may_end_in_v1(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected


# ---- the command


@contextmanager
def serving(answer: Answer) -> Iterator[ScriptedServer]:
    """The scripted server on a thread of its own, for as long as the context lasts."""
    server, loop, stop = ScriptedServer(answer), asyncio.new_event_loop(), asyncio.Event()
    is_up = threading.Event()

    async def main() -> None:
        async with server:
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert is_up.wait(60)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def command(*arguments: str) -> Any:
    app = Typer()
    app.command()(serve.main)
    return CliRunner().invoke(
        app, ["--model", "m", "--input", "6", "--output", "4", *arguments], catch_exceptions=False
    )


def test_json_has_one_entry_a_level() -> None:
    with serving(streaming([1, 1, 2])) as server:
        result = command("--url", server.url, "--concurrency", "1,3", "--requests", "5", "--json")
    assert result.exit_code == 0
    levels = json.loads(result.stdout)
    assert [(level["concurrency"], level["requests"], level["failures"]) for level in levels] == [(1, 5, 0), (3, 5, 0)]
    assert all(level["output_tokens"] == 20 and level["output_tokens_per_s"] > 0 for level in levels)
    assert len(server.requests) == (1 + 5) + (3 + 5)  # each level's warm-up comes before


def test_the_table_shows_every_level() -> None:
    with serving(streaming([4])) as server:
        result = command("--url", server.url, "--concurrency", "2", "--requests", "2")
    assert result.exit_code == 0
    assert "m: 6 tokens in, 4 out" in result.stdout


def test_the_api_key_is_sent_and_not_shown() -> None:
    with serving(streaming([4])) as server:
        result = command("--url", server.url, "--concurrency", "1", "--requests", "1", "--api-key", "sesame")
    assert "authorization: bearer sesame" in server.heads[0].lower()
    assert "sesame" not in result.output


def test_failures_are_counted_and_end_it_with_1() -> None:
    with serving(sending(event({"error": {"message": "The worker was lost."}}))) as server:
        result = command("--url", server.url, "--concurrency", "2", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["errors"] == {"error event: The worker was lost.": 2}
    assert "2 of 2 requests failed: error event: The worker was lost." in result.stderr


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    result = command("--url", "http://127.0.0.1:1", "--concurrency", "1")
    assert result.exit_code == 1
    assert "cannot connect to 127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "ftp://127.0.0.1"],
        ["--url", "http://127.0.0.1:1", "--concurrency", "1,x"],
        ["--url", "http://127.0.0.1:1", "--concurrency", "0"],
        ["--url", "http://127.0.0.1:1", "--shared-prefix", "7"],
        ["--url", "http://127.0.0.1:1", "--vocabulary", "5"],
    ],
)
def test_bad_options_are_refused(arguments: list[str]) -> None:
    assert command(*arguments).exit_code == 2
