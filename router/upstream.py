"""A model's upstream: an OpenAI-compatible endpoint elsewhere that takes what this cluster cannot."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import httpx
import pydantic_core

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
from router.metrics import ModelMetrics

CONNECTIONS_MAX = 256
CONNECT_TIMEOUT_S = 5.0
CONNECTION_WAIT_S = 5.0
"""For one of the connections to be free."""
WHOLE_BYTES_MAX = 64 * 2**20
"""Of an answer that is no stream."""
LINE_BYTES_MAX = 4 * 2**20
"""Of one line of a stream."""
RETRY_AFTER_MAX_S = 3600.0
BYTES_PER_TOKEN = 4
"""Of text, as a rule of thumb."""
TOKENS_MAX = 10**9
"""More than that an answer cannot have cost, whatever it tells."""
NOT_FORWARDED = frozenset({"cache", "cache_salt", "service_tier", "timeline"})
"""Fields that are between the client and this server: another server refuses what it does not know, and a tier
there is paid by this server's owner."""
TELLS_OF_THE_REQUEST = frozenset({400, 413, 415, 422})
"""Statuses that go to the client with their body; that of any other may tell of this server's account there."""


class UpstreamFailed(Unavailable):
    """The upstream cannot be reached, or does not answer as it should."""


class Upstream:
    """Connects when it is first needed."""

    def __init__(
        self,
        settings: UpstreamSettings,
        model: str,
        metrics: ModelMetrics,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Raises SettingsError if the URL is none, or the key cannot be read."""
        self.use, self._timeout_s, self._metrics = settings.use, settings.timeout_s, metrics
        self._model = settings.model or model
        self._client = httpx.AsyncClient(
            base_url=_checked_url(settings.url, model),
            headers=_headers(settings.api_key_file),
            timeout=httpx.Timeout(settings.timeout_s, connect=CONNECT_TIMEOUT_S, pool=CONNECTION_WAIT_S),
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX),
            transport=transport,
            trust_env=False,  # what this process does is said by its settings alone
        )

    def takes(self, error: BatonError) -> bool:
        """Whether a request that the cluster refused with this error goes upstream. A limit that is the tenant's own
        is no reason."""
        if isinstance(error, Overloaded):
            return self.use == "overflow" and not isinstance(error, RateLimited)
        return isinstance(error, Unavailable)

    async def forward(self, endpoint: str, body: bytes, request_id: RequestId, timeout_s: float) -> "Reply":
        """Sends a request's JSON, checked already, to an endpoint such as "/chat/completions"; the caller closes the
        reply.

        Raises UpstreamFailed, Overloaded or DeadlineExceeded, or InvalidRequest if the JSON cannot be passed on.
        """
        ends_at_s = asyncio.get_running_loop().time() + min(timeout_s, self._timeout_s)
        request = self._client.build_request(
            "POST", endpoint, content=self._renamed(body), headers={"x-request-id": request_id}
        )
        code = "failed"
        try:
            with _sentences():
                async with asyncio.timeout_at(ends_at_s):
                    response = await self._client.send(request, stream=True)
            code = str(response.status_code)
        finally:
            self._metrics.sent_upstream(code)
        if not (response.is_success or response.status_code in TELLS_OF_THE_REQUEST):
            await response.aclose()
            raise _refusal(response)
        return Reply(response, ends_at_s, guess_prompt_tokens(body))

    async def close(self) -> None:
        """Idempotent."""
        await self._client.aclose()

    def _renamed(self, body: bytes) -> bytes:
        """The request as the upstream takes it."""
        try:
            fields = pydantic_core.from_json(body)
        except ValueError:
            raise InvalidRequest("The body holds JSON that cannot be passed on to the model's upstream.") from None
        kept = {name: value for name, value in fields.items() if name not in NOT_FORWARDED}
        return json.dumps(kept | {"model": self._model}, ensure_ascii=False).encode()


class Reply:
    """What the upstream answers, read as it comes. `close` is due, whatever happens."""

    def __init__(self, response: httpx.Response, ends_at_s: float, prompt_tokens: int) -> None:
        self.status = response.status_code
        self.content_type: str = response.headers.get("content-type", "application/json")
        self._response, self._ends_at_s = response, ends_at_s
        self.used_tokens = prompt_tokens
        """What the upstream tells, else about: the prompt's, and one for each event of a stream so far."""
        self._chunks = cast(AsyncGenerator[bytes, None], response.aiter_raw())
        self._rest = b""

    @property
    def is_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")

    async def lines(self) -> bytes:
        """The next whole lines; nothing at the end. Raises UpstreamFailed or DeadlineExceeded where it breaks off."""
        while chunk := await self._chunk():
            lines, end, self._rest = (self._rest + chunk).rpartition(b"\n")
            if len(self._rest) > LINE_BYTES_MAX:
                raise UpstreamFailed(f"The model's upstream sent a line of more than {LINE_BYTES_MAX} bytes.")
            if end:
                self.used_tokens += lines.count(b"data:")
                return lines + end
        rest, self._rest = self._rest, b""
        return rest

    async def whole(self) -> bytes:
        """All of it. Raises UpstreamFailed or DeadlineExceeded."""
        body = bytearray()
        while chunk := await self._chunk():
            body += chunk
            if len(body) > WHOLE_BYTES_MAX:
                raise UpstreamFailed(f"The model's upstream answered with more than {WHOLE_BYTES_MAX} bytes.")
        self.used_tokens = _total_tokens(body) or self.used_tokens
        return bytes(body)

    async def close(self) -> None:
        """Idempotent."""
        await self._chunks.aclose()
        await self._response.aclose()

    async def _chunk(self) -> bytes:
        """Nothing at the end."""
        with _sentences():
            async with asyncio.timeout_at(self._ends_at_s):
                return await anext(self._chunks, b"")


def guess_prompt_tokens(body: bytes) -> int:
    """Of a request, by the length of its JSON: what is sent elsewhere is not tokenized here."""
    return len(body) // BYTES_PER_TOKEN


def _total_tokens(body: bytearray) -> int | None:
    """As the answer tells, if it does."""
    try:
        total = json.loads(body)["usage"]["total_tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return total if isinstance(total, int) and 0 < total < TOKENS_MAX else None


@contextmanager
def _sentences() -> Iterator[None]:
    """Turns what httpx raises into the house's errors."""
    try:
        yield
    except httpx.PoolTimeout:
        raise Overloaded("Every connection to this model's upstream is busy; try again in a moment.") from None
    except (TimeoutError, httpx.ReadTimeout):
        raise DeadlineExceeded("The model's upstream did not answer in the time that this request has.") from None
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise UpstreamFailed("The model's upstream cannot be reached; try again in a while.") from None
    except httpx.HTTPError:
        raise UpstreamFailed("The connection to the model's upstream broke; send the request again.") from None


def _refusal(response: httpx.Response) -> BatonError:
    if response.status_code == 429:
        return Overloaded("The model's upstream has no room either; try again in a while.", _retry_after_s(response))
    return UpstreamFailed(f"The model's upstream answered with status {response.status_code}; try again in a while.")


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("retry-after", "")
    return min(float(given), RETRY_AFTER_MAX_S) if given.isascii() and given.isdecimal() else 1.0


def _checked_url(url: str, model: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SettingsError(f"The upstream of model {model} needs a URL such as https://HOST/v1.")
    return url


def _headers(api_key_file: Path | None) -> Mapping[str, str]:
    """A compressed answer could not be passed on as it comes."""
    headers = {"accept-encoding": "identity", "content-type": "application/json"}
    if api_key_file is not None:
        headers["authorization"] = f"Bearer {_read_key(api_key_file)}"
    return headers


def _read_key(file: Path) -> str:
    try:
        key = file.read_text("ascii").strip()
    except (OSError, ValueError):
        raise SettingsError(f"The file {file} with an upstream's API key cannot be read as ASCII text.") from None
    if not key or not key.isprintable() or " " in key:
        raise SettingsError(f"The file {file} must hold an upstream's API key, on one line and nothing else.")
    return key
