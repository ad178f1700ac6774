"""What dies while real workers serve through real routers: no stream is lost, and every text is right.

Right is what the same request gave undisturbed: the model computes in float32, and sampling depends on seed,
position and logits alone.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import pytest

from baton.cluster.redis_server import EmbeddedRedis
from engine.recall.text import make_ledger, prompt
from tests.cluster.processes import PATIENCE_S, Process, fetch, running, until

LEDGER = make_ledger(40, seed=5)
LOCKERS = sorted(LEDGER.owners)
WORKER = {"threads": 1, "kv_blocks": 2048, "self_test": False}
STREAMS = 20


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def flags(redis_server: EmbeddedRedis, key_prefix: str) -> dict[str, Any]:
    return {"redis_url": redis_server.url, "key_prefix": key_prefix}


def start_cluster(stack: ExitStack, flags: dict[str, Any], routers: int) -> list[Process]:
    """Two prefill and two decode workers, all at once, and so many routers that know them."""
    start = partial(running, **flags)
    workers = [
        start(f"{role}-worker", **WORKER, worker_id=f"{role}-{n}") for role in ("prefill", "decode") for n in "01"
    ]
    with ThreadPoolExecutor(4) as starters:
        list(starters.map(stack.enter_context, workers))
        started = list(starters.map(stack.enter_context, [start("router", http_port=0) for _ in range(routers)]))
    for router in started:
        until(lambda router=router: is_ready(router), PATIENCE_S, "the router found the workers")
    return started


def body(index: int, tokens: int) -> dict[str, Any]:
    """Odd ones are drawn at random with a seed, with penalties; even ones greedily."""
    sampled = {"temperature": 0.9, "seed": index, "presence_penalty": 0.5, "frequency_penalty": 0.1}
    return {
        "model": "recall",
        "prompt": prompt(LEDGER, LOCKERS[index]),
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        **(sampled if index % 2 else {"temperature": 0}),
    }


@dataclass
class Told:
    """What one stream has said so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    error: str | None = None


async def listen(client: httpx.AsyncClient, url: str, request: dict[str, Any], told: Told) -> None:
    async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                told.error = event["error"]["message"]
                continue
            told.usage = event["usage"] or told.usage
            for choice in event["choices"]:
                told.text += choice["text"]
                told.token_ids += choice["token_ids"] or []
                told.finish_reason = choice["finish_reason"] or told.finish_reason


async def listen_all(urls: Sequence[str], requests: Sequence[dict[str, Any]], told: Sequence[Told]) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client, asyncio.TaskGroup() as group:
        for place, (request, one) in enumerate(zip(requests, told, strict=True)):
            group.create_task(listen(client, urls[place % len(urls)], request, one))


def ask_all(
    urls: Sequence[str], requests: Sequence[dict[str, Any]], meanwhile: Callable[[list[Told]], object] = lambda _: None
) -> list[Told]:
    """All at once, over the routers in turn; `meanwhile` sees what has been told so far."""
    told = [Told() for _ in requests]
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(asyncio.run, listen_all(urls, requests, told))
        meanwhile(told)
        asked.result()
    return told


def is_ready(router: Process) -> bool:
    return httpx.get(f"{router.http}/health", timeout=PATIENCE_S).status_code == 200


def workers(router: Process) -> dict[str, Any]:
    return {worker["worker_id"]: worker for worker in fetch(f"{router.http}/v1/workers")["data"]}


def index_is_fresh(router: Process) -> bool:
    return not fetch(f"{router.http}/health")["index"]["stale_workers"]


def check_equal(told: Sequence[Told], expected: Sequence[Told]) -> None:
    for one, reference in zip(told, expected, strict=True):
        assert one.error is None
        assert one.token_ids == reference.token_ids, "a token was wrong, lost or repeated"
        assert (one.text, one.finish_reason) == (reference.text, reference.finish_reason)
        assert one.usage and reference.usage
        assert one.usage["completion_tokens"] == reference.usage["completion_tokens"]


def test_a_decode_worker_killed_with_twenty_streams_on_it(flags: dict[str, Any], stack: ExitStack) -> None:
    stack.enter_context(running("prefill-worker", **flags, **WORKER))
    first = stack.enter_context(running("decode-worker", **flags, **WORKER, worker_id="decode-first"))
    routers = [stack.enter_context(running("router", **flags, http_port=0)) for _ in range(2)]
    for router in routers:
        until(lambda router=router: is_ready(router), PATIENCE_S, "the router found the decode worker")
    urls = [router.http for router in routers]
    requests = [body(index, tokens=300) for index in range(STREAMS)]
    expected = ask_all(urls, requests)
    assert len({one.text for one in expected}) > STREAMS // 2, "they say different things"

    def replace_worker(told: list[Told]) -> None:
        until(lambda: all(len(one.token_ids) >= 3 for one in told), 60, "all twenty are streaming")
        first.kill()
        assert all(one.usage is None for one in told), "none has ended"
        stack.enter_context(running("decode-worker", **flags, **WORKER, worker_id="decode-second"))

    told = ask_all(urls, requests, replace_worker)
    check_equal(told, expected)
    until(
        lambda: all(w["kv_blocks_used"] == 0 for w in workers(routers[0]).values() if w["reachable"]),
        PATIENCE_S,
        "no leak",
    )


def test_redis_killed_and_restarted_while_streams_run(key_prefix: str, stack: ExitStack) -> None:
    redis = EmbeddedRedis()
    stack.callback(redis.stop)
    redis.start()
    flags = {"redis_url": redis.url, "key_prefix": key_prefix}
    (router,) = start_cluster(stack, flags, routers=1)
    urls, requests = [router.http], [body(index, tokens=150) for index in range(8)]
    expected = ask_all(urls, requests)

    def kill_redis(told: list[Told]) -> None:
        until(lambda: all(one.token_ids for one in told), 60, "all are streaming")
        os.kill(redis.pid, signal.SIGKILL)

    check_equal(ask_all(urls, requests, kill_redis), expected)
    check_equal(ask_all(urls, requests), expected)
    assert is_ready(router), "without Redis it serves from its last state"
    check_equal(ask_all(urls, requests, lambda _: redis.start()), expected)
    until(lambda: index_is_fresh(router), PATIENCE_S, "the index has been reconciled")
    check_equal(ask_all(urls, requests), expected)


def test_a_router_killed_and_restarted_while_streams_run(flags: dict[str, Any], stack: ExitStack) -> None:
    first, second = start_cluster(stack, flags, routers=2)
    requests = [body(index, tokens=150) for index in range(8)]
    expected = ask_all([first.http, second.http], requests)

    def kill_first(told: list[Told]) -> None:
        until(lambda: all(one.token_ids for one in told), 60, "all are streaming")
        url = f"{first.http}/v1/completions"
        with suppress(httpx.TransportError), httpx.stream("POST", url, json=body(9, tokens=2000), timeout=120) as lost:
            for _ in lost.iter_lines():
                first.kill()

    check_equal(ask_all([second.http], requests, kill_first), expected)
    third = stack.enter_context(running("router", **flags, http_port=0))
    until(lambda: is_ready(third), PATIENCE_S, "the new one is ready")
    assert index_is_fresh(third), "it is warm when it says that it is ready"
    whole = body(0, tokens=5) | {"stream": False, "stream_options": None}
    answer = httpx.post(f"{third.http}/v1/completions", json=whole, timeout=120)
    assert answer.status_code == 200, answer.text
    (placement,) = fetch(f"{third.http}/v1/decisions/{answer.headers['x-baton-request-id']}")["placements"]
    assert placement["candidates"][0]["cached_tokens_hbm"] > 0, "it knew which worker holds the prompt"
    check_equal(ask_all([second.http, third.http], requests), expected)
    until(lambda: all(w["kv_blocks_used"] == 0 for w in workers(third).values()), PATIENCE_S, "no block is leaked")
