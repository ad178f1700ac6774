"""The load generator: many clients, each of them asking and reading to the end, over and over."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from baton.clock import monotonic
from bench.measure import Chunk, Completed, Failed, Outcome
from bench.sse import Endpoint, Response, SSEConnection, StaleConnection, StreamError

FIRST_TOKEN_ID = 100
"""Below it lie the special tokens of many models."""
REASON_LENGTH_MAX = 200


@dataclass(frozen=True, slots=True)
class Load:
    model: str
    input_tokens: int
    output_tokens: int
    shared_prefix_tokens: int
    """How many of the input tokens are the same in all requests."""
    vocabulary: int
    """Token ids are drawn from FIRST_TOKEN_ID up to, not including, this."""

    def bodies(self, randomness: random.Random) -> Iterator[dict[str, Any]]:
        """Endless requests; what follows the shared prefix is drawn anew for each."""
        ids = range(FIRST_TOKEN_ID, self.vocabulary)
        prefix = randomness.choices(ids, k=self.shared_prefix_tokens)
        while True:
            yield {
                "model": self.model,
                "prompt": prefix + randomness.choices(ids, k=self.input_tokens - len(prefix)),
                "max_tokens": self.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }


class Stream:
    """One request's answer as it comes in: a listener of SSEConnection, then an Outcome."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.usage: dict[str, Any] = {}
        self.error: str | None = None
        self.is_done = False

    def __call__(self, arrival_s: float, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            self._read(arrival_s, json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.error = f"an event of the stream cannot be read: {type(error).__name__}"

    def _read(self, arrival_s: float, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = f"error event: {event['error']['message']}"
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids")
            text = choice.get("text") or choice.get("delta", {}).get("content")
            if ids or (ids is None and text):
                self.chunks.append(Chunk(arrival_s, len(ids) if ids else None))

    def outcome(self, response: Response, start_s: float, end_s: float) -> Outcome:
        if reason := self._problem(response):
            return Failed(reason[:REASON_LENGTH_MAX])
        return Completed(
            start_s=start_s,
            end_s=end_s,
            chunks=tuple(self.chunks),
            input_tokens=self.usage["prompt_tokens"],
            output_tokens=self.usage["completion_tokens"],
            cached_tokens=(self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        )

    def _problem(self, response: Response) -> str | None:
        if response.status != 200:
            return f"HTTP {response.status}: {error_message(response.body)}"
        if self.error is not None:
            return self.error
        if not self.is_done or not self.chunks or not self.usage:
            return "the stream ended without its tokens, usage or [DONE]"
        said = sum(chunk.tokens or 0 for chunk in self.chunks)
        if said and said != self.usage["completion_tokens"]:
            return "the stream held other than usage.completion_tokens tokens"
        return None


def error_message(body: bytes) -> str:
    """The sentence in an OpenAI-shaped error, or else the body itself."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


async def ask(connection: SSEConnection, request: bytes, stream: Stream | None = None) -> Outcome:
    """One request, timed from when it is written to an open connection. Raises StaleConnection."""
    stream = stream or Stream()
    start_s = monotonic()
    try:
        response = await connection.request(request, stream)
    except StaleConnection:
        raise
    except StreamError as error:
        return Failed(str(error))
    return stream.outcome(response, start_s, monotonic())


@dataclass(frozen=True, slots=True)
class Client:
    """The load generator of one server. `timeout_s` bounds each request."""

    endpoint: Endpoint
    timeout_s: float

    async def run(self, concurrency: int, requests: list[bytes], advance: Callable[[], None]) -> list[Outcome]:
        """Sends all requests, so many at a time; calls `advance` after each."""
        left = iter(requests)  # shared: each client takes the next one
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(self._send_all(left, advance)) for _ in range(concurrency)]
        return [outcome for client in clients for outcome in client.result()]

    async def _send_all(self, requests: Iterator[bytes], advance: Callable[[], None]) -> list[Outcome]:
        connection: SSEConnection | None = None
        outcomes = []
        for request in requests:
            connection, outcome = await self._send(connection, request)
            outcomes.append(outcome)
            advance()
        if connection is not None:
            connection.close()
        return outcomes

    async def _send(self, connection: SSEConnection | None, request: bytes) -> tuple[SSEConnection | None, Outcome]:
        try:
            async with asyncio.timeout(self.timeout_s):
                if connection is None or not connection.is_open:
                    connection = await SSEConnection.connect(self.endpoint)
                try:
                    return connection, await ask(connection, request)
                except StaleConnection:
                    connection = await SSEConnection.connect(self.endpoint)
                    return connection, await ask(connection, request)
        except TimeoutError:
            return None, Failed(f"no answer within {self.timeout_s:g} s")
        except OSError as error:
            return None, Failed(f"cannot connect to {self.endpoint.host}:{self.endpoint.port}: {error.strerror}")
