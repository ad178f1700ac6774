"""An HTTP server that answers completions as told: a stand-in for the servers that bench.serve measures."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


class ScriptedServer:
    """Keeps connections alive; records the requests and how many were in progress at once."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0
        self.in_progress = 0
        self.in_progress_max = 0

    async def __aenter__(self) -> "ScriptedServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                self.heads.append(head)
                self.requests.append(json.loads(await reader.readexactly(length)))
                self.in_progress += 1
                self.in_progress_max = max(self.in_progress_max, self.in_progress)
                await self.answer(self.requests[-1], writer)
                self.in_progress -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def event(body: dict[str, Any] | str) -> bytes:
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


def token_events(counts: Sequence[int], prompt_tokens: int, *, with_ids: bool = True) -> list[bytes]:
    """A completion stream whose chunks hold so many tokens each, with usage at the end."""
    choices = [{"index": 0, "text": "x" * n} | ({"token_ids": [7] * n} if with_ids else {}) for n in counts]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": sum(counts)}
    events = [event({"choices": [choice], "usage": None}) for choice in choices]
    return [*events, event({"choices": [], "usage": usage}), event("[DONE]")]


async def send_stream(writer: asyncio.StreamWriter, content: bytes, piece_bytes: int) -> None:
    """Sends an event stream in HTTP chunks of that size, whatever they cut through."""
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    for start in range(0, len(content), piece_bytes):
        piece = content[start : start + piece_bytes]
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def send_json(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body
    )
    await writer.drain()
