"""A router that answers every request alike, and remembers what it was asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Canned(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.body = 200, b""
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.posts: list[tuple[str, Any]] = []
        """Paths and bodies."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Canned)
        self.server.paths.append(self.path)
        self._answer()

    def do_POST(self) -> None:
        assert isinstance(self.server, Canned)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.posts.append((self.path, json.loads(body)))
        self._answer()

    def _answer(self) -> None:
        assert isinstance(self.server, Canned)
        self.server.authorizations.append(self.headers.get("authorization"))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Canned]:
    with Canned() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
