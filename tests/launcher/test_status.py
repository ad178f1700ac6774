import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from canned_router import Canned, serving
from rich.console import Console

from baton.errors import SettingsError, Unavailable
from launcher.status import fetch_workers, render

WORKER = {
    "worker_id": "decode-0",
    "role": "decode",
    "model": "recall",
    "pool": "h100",
    "state": "ready",
    "address": "127.0.0.1:1",
    "running_sequences": 3,
    "waiting_sequences": 1,
    "waiting_tokens": 5,
    "kv_blocks_total": 4096,
    "kv_blocks_used": 12,
    "kv_blocks_cached": 7,
    "reachable": True,
}


@pytest.fixture
def router() -> Iterator[Canned]:
    with serving() as server:
        yield server


def text(workers: list[dict[str, Any]]) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render(workers))
    return captured.get()


def test_workers_come_from_the_router(router: Canned) -> None:
    router.body = json.dumps({"data": [WORKER]}).encode()
    assert fetch_workers(router.url + "/") == [WORKER]


def test_the_table_has_what_an_operator_asks_for() -> None:
    lines = text([WORKER, {**WORKER, "worker_id": "prefill-0", "role": "prefill"}]).splitlines()
    assert lines[1].startswith("prefill-0")
    assert lines[2].split() == ["decode-0", "decode", "recall", "h100", "ready", "127.0.0.1:1", "3", "1", "12/4,096"]


def test_a_worker_that_does_not_answer_is_told_from_one_that_does() -> None:
    assert "unreachable" in text([{**WORKER, "reachable": False}])


def test_no_worker_is_a_sentence() -> None:
    assert "no worker has announced itself" in text([])


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data": 1}'])
def test_somebody_who_is_no_router_is_found_out(router: Canned, body: bytes) -> None:
    router.body = body
    with pytest.raises(Unavailable, match="not as a Baton router does"):
        fetch_workers(router.url)


def test_an_error_status_is_told(router: Canned) -> None:
    router.status = 404
    with pytest.raises(Unavailable, match="404"):
        fetch_workers(router.url)


def test_nobody_there_is_told() -> None:
    with pytest.raises(Unavailable, match="No router can be reached"):
        fetch_workers("http://127.0.0.1:1")


def test_what_is_no_url_is_told() -> None:
    with pytest.raises(SettingsError, match="http://HOST:PORT"):
        fetch_workers("localhost")


def test_a_port_that_does_not_speak_http_is_named_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"\0\0\x18\x04\0\0\0\0\0")  # as a gRPC server does

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Unavailable, match="not as a Baton router does"):
            fetch_workers(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
