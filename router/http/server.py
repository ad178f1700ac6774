"""uvicorn as a part of a process rather than its master: it takes no signals and sets up no logging."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from baton.errors import SettingsError

BACKLOG = 2048


class HttpServer:
    def __init__(self, app: ASGIApp, host: str, port: int, drain_timeout_s: float) -> None:
        self._app, self._host, self._port, self._drain_timeout_s = app, host, port, drain_timeout_s
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on; a free one was picked at start if 0 was asked for."""
        return self._port

    async def start(self) -> None:
        """Raises SettingsError if the address cannot be had."""
        listener = listen(self._host, self._port)
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(self._drain_timeout_s)),
        )
        self._server = _QuietServer(config)
        self._serving = asyncio.create_task(self._server.serve([listener]), name="http server")

    async def stop(self) -> None:
        """Idempotent. Takes no new connections, and cancels after the drain timeout what has not finished."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's signals are the process's own."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Raises SettingsError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets that say they are TCP; left on, it holds a response
    # back for the 40 ms that the client's delayed acknowledgement takes.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"Port {port} on {host} cannot be listened on: {error.strerror}. "
            "Choose another with --http-port (0 picks a free one) or --host."
        ) from None
    return listener
