"""Reading a request's body within bounds, noticing that its client left, and writing events to it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import InvalidRequest
from router.http.errors import BodyTooLarge, json_text

BODY_TIMEOUT_S = 60.0
STALL_S = 60.0
"""How much longer than the request itself a client may take to read its stream."""
T = TypeVar("T")
SendEvent = Callable[[object], Awaitable[None]]
"""Takes text, or what becomes JSON; bytes are lines of events already."""


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Raises BodyTooLarge without holding more than `bytes_max`, InvalidRequest if the client stops sending,
    ClientDisconnect if it leaves."""
    too_large = BodyTooLarge(f"The body is larger than {bytes_max} bytes, the most that this server takes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > bytes_max:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                if len(body) + len(part) > bytes_max:
                    raise too_large
                body += part
    except TimeoutError:
        raise InvalidRequest(f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    return bytes(body)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The work's outcome. Raises ClientDisconnect, the work being cancelled, if the client leaves first.

    The request's body must have been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `write` sends them; `close` is called when it has, or the client has left."""

    def __init__(
        self,
        write: Callable[[SendEvent], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers={**own, **(headers or {})})
        del self.headers["content-length"]
        self._write, self._close, self._timeout_s = write, close, timeout_s + STALL_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_part = scope["state"].get("send_part", send)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with asyncio.timeout(self._timeout_s):
                await while_connected(receive, self._write(_event_sender(send_part)))
            await send({"type": "http.response.body", "body": b""})
        except (ClientDisconnect, TimeoutError):
            pass  # nobody reads any more
        finally:
            await self._close()


def _event(body: object) -> bytes:
    if isinstance(body, bytes):
        return body
    return f"data: {body if isinstance(body, str) else json_text(body)}\n\n".encode()


def _event_sender(send: Send) -> SendEvent:
    async def send_event(body: object) -> None:
        await send({"type": "http.response.body", "body": _event(body), "more_body": True})

    return send_event
