import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RateLimited,
    SettingsError,
    Unavailable,
)
from baton.ids import RequestId
from baton.settings import UpstreamSettings
from router import upstream as module
from router.metrics import RouterMetrics
from router.upstream import Reply, Upstream, UpstreamFailed

REQUEST = RequestId("mine")
Answer = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]


class Pieces(httpx.AsyncByteStream):
    """A body in these pieces, which ends as `end` does."""

    def __init__(self, *pieces: bytes, end: Callable[[], None] = lambda: None) -> None:
        self._pieces, self._end, self.is_closed = pieces, end, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        self._end()

    async def aclose(self) -> None:
        self.is_closed = True


class Rig:
    def __init__(self, answer: Answer, **settings: Any) -> None:
        self.registry = CollectorRegistry()
        self.requests: list[httpx.Request] = []
        chosen = UpstreamSettings(**{"url": "http://upstream/v1", "model": "theirs", **settings})
        transport = httpx.MockTransport(self._answer)
        self.answer = answer
        self.upstream = Upstream(chosen, "ours", RouterMetrics(self.registry).of("ours"), transport)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answer(request)
        return answer if isinstance(answer, httpx.Response) else await answer

    async def forward(self, timeout_s: float = 60, **fields: Any) -> Reply:
        body = json.dumps({"model": "ours", "prompt": "hello", **fields}).encode()
        return await self.upstream.forward("/completions", body, REQUEST, timeout_s)

    def counted(self, code: str) -> float:
        labels = {"model": "ours", "code": code}
        return self.registry.get_sample_value("baton_upstream_requests_total", labels) or 0.0


def says(status: int, body: object = None, **headers: str) -> Answer:
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    return lambda _: httpx.Response(status, headers=headers, stream=Pieces(content))


def streams(body: httpx.AsyncByteStream) -> Answer:
    return lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=body)


def raises(error: Exception) -> Answer:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error

    return answer


async def lines_of(reply: Reply) -> list[bytes]:
    lines = []
    while part := await reply.lines():
        lines.append(part)
    return lines


def test_the_request_goes_on_under_its_name_there_and_with_its_key(tmp_path: Path) -> None:
    async def main() -> None:
        key = tmp_path / "key"
        key.write_text("sk-theirs\n")
        rig = Rig(says(200, {"id": "x"}), api_key_file=key)
        reply = await rig.forward(temperature=0.5, cache_salt="s", timeline=True, service_tier="priority", top_k=3)
        assert (reply.status, json.loads(await reply.whole())) == (200, {"id": "x"})
        (request,) = rig.requests
        assert str(request.url) == "http://upstream/v1/completions"
        assert json.loads(request.content) == {"model": "theirs", "prompt": "hello", "temperature": 0.5, "top_k": 3}
        assert request.headers["authorization"] == "Bearer sk-theirs"
        assert request.headers["x-request-id"] == "mine"
        assert rig.counted("200") == 1
        await reply.close()
        await rig.upstream.close()

    asyncio.run(main())


def test_without_a_name_of_its_own_the_model_keeps_ours() -> None:
    async def main() -> None:
        rig = Rig(says(200, {}), model=None)
        await (await rig.forward()).close()
        assert json.loads(rig.requests[0].content)["model"] == "ours"
        assert "authorization" not in rig.requests[0].headers

    asyncio.run(main())


def test_a_stream_comes_in_whole_lines_however_it_was_cut() -> None:
    async def main() -> None:
        body = Pieces(b"data: a\n\nda", b"ta: ", b"b\n", b"\ndata: [DO", b"NE]\n\n", b"tail")
        reply = await Rig(streams(body)).forward(stream=True)
        assert reply.is_stream
        assert await lines_of(reply) == [b"data: a\n\n", b"data: b\n", b"\n", b"data: [DONE]\n\n", b"tail"]
        await reply.close()
        assert body.is_closed

    asyncio.run(main())


def test_a_stream_that_breaks_is_told_after_what_came_whole() -> None:
    def broken() -> None:
        raise httpx.ReadError("connection reset by 10.1.2.3")

    async def main() -> None:
        reply = await Rig(streams(Pieces(b"data: a\n\ndata: ha", end=broken))).forward(stream=True)
        assert await reply.lines() == b"data: a\n\n"
        with pytest.raises(UpstreamFailed, match="broke") as caught:
            await reply.lines()
        assert "10.1.2.3" not in str(caught.value)
        await reply.close()

    asyncio.run(main())


def test_lines_and_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES_MAX", 10)
    monkeypatch.setattr(module, "WHOLE_BYTES_MAX", 10)

    async def main() -> None:
        for read in (Reply.lines, Reply.whole):
            reply = await Rig(streams(Pieces(b"12345678", b"12345678"))).forward()
            with pytest.raises(UpstreamFailed, match="10 bytes"):
                await read(reply)
            await reply.close()

    asyncio.run(main())


def test_what_was_used_is_what_the_upstream_tells_or_about_that() -> None:
    async def main() -> None:
        told = await Rig(says(200, {"usage": {"total_tokens": 321}})).forward()
        assert 0 < told.used_tokens < 50, "the prompt's, by its length"
        await told.whole()
        assert told.used_tokens == 321
        for usage in (None, {}, {"total_tokens": "many"}, {"total_tokens": -5}, {"total_tokens": 10**30}):
            silent = await Rig(says(200, {"usage": usage})).forward()
            guess = silent.used_tokens
            await silent.whole()
            assert silent.used_tokens == guess
        stream = await Rig(streams(Pieces(b"data: a\n\ndata: b\n\nda", b"ta: c\n\n"))).forward()
        guess = stream.used_tokens
        await lines_of(stream)
        assert stream.used_tokens == guess + 3

    asyncio.run(main())


def test_the_callers_fault_is_passed_on_with_its_body() -> None:
    async def main() -> None:
        rig = Rig(says(400, {"error": {"message": "temperature is too high"}}))
        reply = await rig.forward()
        assert reply.status == 400 and b"too high" in await reply.whole()
        await reply.close()
        assert rig.counted("400") == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "kind", "sentence", "code"),
    [
        (says(401, {"error": {"message": "Incorrect API key: sk-th...irs"}}), UpstreamFailed, "status 401", "401"),
        (says(404, {}), UpstreamFailed, "status 404", "404"),
        (says(500, {}), UpstreamFailed, "status 500", "500"),
        (says(302, location="http://elsewhere"), UpstreamFailed, "status 302", "302"),
        (says(429, {}, **{"retry-after": "7"}), Overloaded, "no room", "429"),
        (raises(httpx.ConnectError("refused")), UpstreamFailed, "cannot be reached", "failed"),
        (raises(httpx.ConnectTimeout("late")), UpstreamFailed, "cannot be reached", "failed"),
        (raises(httpx.PoolTimeout("busy")), Overloaded, "busy", "failed"),
        (raises(httpx.ReadTimeout("late")), DeadlineExceeded, "in the time", "failed"),
        (raises(httpx.RemoteProtocolError("what")), UpstreamFailed, "broke", "failed"),
    ],
)
def test_what_goes_wrong_there_is_a_sentence_that_tells_nothing_of_the_account(
    answer: Answer, kind: type[BatonError], sentence: str, code: str
) -> None:
    async def main() -> None:
        rig = Rig(answer)
        with pytest.raises(kind, match=sentence) as caught:
            await rig.forward()
        assert type(caught.value) is kind and "sk-" not in str(caught.value)
        assert rig.counted(code) == 1
        if isinstance(caught.value, Overloaded) and code == "429":
            assert caught.value.retry_after_s == 7

    asyncio.run(main())


def test_what_takes_too_long_is_given_up() -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        rig = Rig(never)
        with pytest.raises(DeadlineExceeded):
            await rig.forward(timeout_s=0.01)

    asyncio.run(main())


def test_json_that_python_will_not_read_is_the_callers_error() -> None:
    async def main() -> None:
        rig = Rig(says(200, {}))
        with pytest.raises(InvalidRequest):
            await rig.upstream.forward("/completions", b'{"model": "m", "x": ' + b"[" * 10_000, REQUEST, 1)
        assert not rig.requests

    asyncio.run(main())


@pytest.mark.parametrize("use", ["overflow", "fallback", "always"])
def test_what_goes_upstream(use: str) -> None:
    upstream = Rig(says(200, {}), use=use).upstream
    assert upstream.takes(Unavailable("no worker"))
    assert upstream.takes(Overloaded("full")) is (use == "overflow")
    assert not upstream.takes(RateLimited("the tenant's own"))
    assert not upstream.takes(InvalidRequest("wrong")) and not upstream.takes(DeadlineExceeded("late"))


@pytest.mark.parametrize("url", ["", "upstream/v1", "ftp://h/v1", "http://", "http://[::bad/v1"])
def test_what_is_no_url_stops_the_start(url: str) -> None:
    with pytest.raises(SettingsError, match="model ours needs a URL"):
        Rig(says(200), url=url)


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", b"\xff\xfe"])
def test_a_file_without_a_key_stops_the_start_and_is_not_quoted(tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "key"
    key.write_bytes(content)
    with pytest.raises(SettingsError, match="API key") as caught:
        Rig(says(200), api_key_file=key)
    assert "words" not in str(caught.value) and "lines" not in str(caught.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        Rig(says(200), api_key_file=tmp_path / "none")
