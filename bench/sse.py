"""One keep-alive HTTP/1.1 connection that posts JSON and hears server-sent events.

Written for measuring: every event bears the time its bytes arrived, the parsing of HTTP is
httptools', and nothing is awaited per event, so that 32 streams cost a few per cent of a core.
"""

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from baton.clock import Clock, monotonic

LINE_BYTES_MAX = 4 * 2**20
"""Longest line of a stream."""
BODY_BYTES_MAX = 64 * 2**10
"""How much of a body that is no event stream is kept."""

EventListener = Callable[[float, bytes], None]
"""Called as `listener(arrival_s, data)` with what follows `data:`."""


class StreamError(Exception):
    """The connection broke or the peer does not speak HTTP/1.1."""


class StaleConnection(StreamError):
    """The peer closed an idle connection just as the next request was sent: ask again on a new one."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int
    tls: bool
    prefix: str
    """What the path of every request starts with; empty but behind a proxy."""

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Takes `http://HOST:PORT` with or without `/v1`; raises ValueError for anything else."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not of the form http://HOST:PORT")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))

    def post(self, path: str, body: Any, api_key: str | None = None) -> bytes:
        """The bytes of a request, made beforehand so that none are made while measuring."""
        content = json.dumps(body, separators=(",", ":")).encode()
        head = [
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Accept: text/event-stream",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        ]
        if api_key is not None:
            head.append(f"Authorization: Bearer {api_key}")
        return "\r\n".join([*head, "", ""]).encode() + content


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    """Empty when the answer was an event stream; else its first bytes."""


class SSEConnection(asyncio.Protocol):
    """Use `connect`; one request at a time."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._response: asyncio.Future[Response] | None = None
        self._listener: EventListener | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._arrival_s: float | None = None
        self._is_used = False
        self._is_stream = False
        self._rest = b""  # the line that has not ended yet
        self._body = bytearray()

    @classmethod
    async def connect(cls, endpoint: Endpoint, clock: Clock = monotonic) -> "SSEConnection":
        """Raises OSError when nobody answers there."""
        context = ssl.create_default_context() if endpoint.tls else None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(clock), endpoint.host, endpoint.port, ssl=context)
        return connection

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def request(self, request: bytes, listener: EventListener) -> Response:
        """Sends it and returns when the answer is complete. Raises StreamError. A cancelled request
        closes the connection, which is how a server learns of it."""
        if not self.is_open or self._transport is None:
            raise StreamError("the connection is closed")
        assert self._response is None, "one request at a time"
        self._parser = httptools.HttpResponseParser(self)
        self._listener, self._is_stream = listener, False
        self._arrival_s, self._rest, self._body = None, b"", bytearray()
        self._response = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            return await self._response
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._response = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: StreamError) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(error)
        self.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is none by class

    def data_received(self, data: bytes) -> None:
        self._arrival_s = self._clock()
        if self._response is None or self._response.done():
            self.close()  # nobody asked for this
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(StreamError(f"the answer is not HTTP/1.1: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        is_stale = self._is_used and self._arrival_s is None
        self._fail(
            (StaleConnection if is_stale else StreamError)(f"the connection was lost ({exc or 'closed by the peer'})")
        )

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type" and value.startswith(b"text/event-stream"):
            self._is_stream = self._parser.get_status_code() == 200

    def on_body(self, body: bytes) -> None:
        assert self._listener is not None and self._arrival_s is not None
        if not self._is_stream:
            self._body += body[: BODY_BYTES_MAX - len(self._body)]
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            self._fail(StreamError(f"a line of the stream is longer than {LINE_BYTES_MAX} bytes"))
        for line in lines:
            if line.startswith(b"data:"):
                self._listener(self._arrival_s, line[5:].strip())

    def on_message_complete(self) -> None:
        self._is_used = True
        assert self._response is not None
        if not self._response.done():
            self._response.set_result(Response(self._parser.get_status_code(), bytes(self._body)))
        if not self._parser.should_keep_alive():
            self.close()
