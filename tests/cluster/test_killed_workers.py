"""Workers killed with -9 in the middle of a request: the answer is right all the same, or the error is clear.

The model is the recall model, a few layers heavier so that its prefill takes seconds: one wrong KV block
would show as a wrong name.
"""

import concurrent.futures
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from engine.recall.model import build_recall_model
from engine.recall.text import make_ledger, question
from tests.cluster.processes import PATIENCE_S, Process, fetch, free_port, metric, running, until

LEDGER = make_ledger(400, seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "heavy-recall"
    build_recall_model(directory, extra_layers=8)
    return directory


@pytest.fixture
def flags(model: Path, redis_server: EmbeddedRedis, key_prefix: str) -> dict[str, Any]:
    return {"model": model, "served_model_name": "recall", "redis_url": redis_server.url, "key_prefix": key_prefix}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def ask(router: Process, locker: str) -> Any:
    messages = [{"role": "system", "content": LEDGER.text}, {"role": "user", "content": question(locker)}]
    body = {"model": "recall", "messages": messages, "temperature": 0, "timeline": True}
    return fetch(f"{router.http}/v1/chat/completions", body)


def text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"]).strip()


def workers(router: Process) -> dict[str, Any]:
    return {worker["role"]: worker for worker in fetch(f"{router.http}/v1/workers")["data"]}


def is_ready(router: Process) -> bool:
    try:
        return bool(fetch(f"{router.http}/health"))
    except urllib.error.HTTPError:
        return False


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_prefill_worker_killed_while_it_streams(transport: str, flags: dict[str, Any], stack: ExitStack) -> None:
    metrics_port = free_port()
    # Alike in chunks too: else the prompt would go where fewer of them are predicted to take less.
    alike = {"threads": 1, "self_test": False, "chunk_tokens": 64}
    worker_flags = {**flags, **alike, "transports": transport, "kv_blocks": 512}
    decode = stack.enter_context(running("decode-worker", **worker_flags))
    prefill = stack.enter_context(running("prefill-worker", **worker_flags, metrics_port=metrics_port))
    router = stack.enter_context(running("router", **flags, http_port=0))
    lockers = sorted(LEDGER.owners)[::40]
    with concurrent.futures.ThreadPoolExecutor(1) as caller:
        asked = caller.submit(ask, router, lockers[0])
        sent = r"baton_kv_transfer_bytes_total\{.*out"
        until(lambda: metric(metrics_port, sent) > 0, 60, "slices are sent")
        assert not asked.done()
        prefill.kill()
        answer = asked.result()
    assert text(answer) == f"{LEDGER.owners[lockers[0]]}."
    assert answer["timeline"]["prefill_worker"] == "", "the decode worker computed it itself"
    for locker in lockers[1:4]:
        assert text(ask(router, locker)) == f"{LEDGER.owners[locker]}."
    until(lambda: workers(router)["decode"]["kv_blocks_used"] == 0, PATIENCE_S, "no block is leaked")
    assert decode.popen.poll() is None


def stream(router: Process, prompt: str) -> Iterator[str]:
    """The pieces of a long answer, as they come; raises if it ends with anything but the end mark."""
    body = {"model": "recall", "prompt": prompt, "max_tokens": 80, "ignore_eos": True, "seed": 7, "stream": True}
    request = urllib.request.Request(
        f"{router.http}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)["choices"][0]["text"]
    raise AssertionError("the stream broke off")


def test_a_decode_worker_killed_while_it_streams_is_no_more_than_a_pause(
    flags: dict[str, Any], stack: ExitStack
) -> None:
    """The only one, and another is started meanwhile: it goes on with the same text."""
    worker_flags = {**flags, "threads": 1, "self_test": False, "kv_blocks": 512}
    decode = stack.enter_context(running("decode-worker", **worker_flags))
    stack.enter_context(running("prefill-worker", **worker_flags, chunk_tokens=64))
    router = stack.enter_context(running("router", **flags, http_port=0, failover_wait_s=250))
    lockers = sorted(LEDGER.owners)[::40]
    undisturbed = "".join(stream(router, LEDGER.text))
    pieces = stream(router, LEDGER.text)
    begun = [next(pieces) for _ in range(20)]
    decode.kill()
    until(lambda: not is_ready(router), PATIENCE_S, "the router knows")
    stack.enter_context(running("decode-worker", **worker_flags))
    assert "".join([*begun, *pieces]) == undisturbed
    until(lambda: is_ready(router), PATIENCE_S, "the router found the new one")
    assert text(ask(router, lockers[1])) == f"{LEDGER.owners[lockers[1]]}."
    until(lambda: workers(router)["prefill"]["kv_blocks_used"] == 0, PATIENCE_S, "no block is leaked")
