"""Tiers below HBM in real processes: killed with -9 and started again on the same file, and peers that fetch.

The model is the recall model: one wrong KV block would show as a wrong name.
"""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.rpc import worker_pb2, worker_pb2_grpc
from engine.recall.text import Ledger, make_ledger, question
from tests.cluster.processes import Process, fetch, running, until

LINES = 60
BLOCK_BYTES = 256 * 1024
"""Of the recall model: 2 layers, 4 heads of 128, 32 tokens, float32."""
POOL_BLOCKS = 48
"""Three of the ledgers' prompts."""
LEDGERS = [make_ledger(LINES, seed) for seed in range(12)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def flags(redis_server: EmbeddedRedis, key_prefix: str) -> dict[str, Any]:
    return {"model": "recall", "redis_url": redis_server.url, "key_prefix": key_prefix}


@pytest.fixture
def worker_flags(flags: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    sizes = {"kv_blocks": POOL_BLOCKS, "ddr_bytes": 48 * BLOCK_BYTES, "ssd_bytes": 512 * BLOCK_BYTES}
    return {**flags, **sizes, "ssd_dir": tmp_path, "threads": 1, "chunk_tokens": 64}


def ask(router: Process, ledger: Ledger, chance: random.Random) -> int:
    """Checks the answer; how many of the prompt's tokens were cached."""
    locker = chance.choice(sorted(ledger.owners))
    messages = [{"role": "system", "content": ledger.text}, {"role": "user", "content": question(locker)}]
    body = {"model": "recall", "messages": messages, "temperature": 0}
    answer = fetch(f"{router.http}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].strip() == f"{ledger.owners[locker]}."
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def blocks(worker: Process, tier: str) -> int:
    with grpc.insecure_channel(worker.grpc) as channel:
        status = worker_pb2_grpc.WorkerStub(channel).GetCacheStatus(worker_pb2.GetCacheStatusRequest(), timeout=10)
    return sum(each.blocks for each in status.tiers if each.tier == worker_pb2.events__pb2.Tier.Value(tier))


def test_a_worker_killed_and_started_again_on_its_file_serves_hits_from_it(
    flags: dict[str, Any], worker_flags: dict[str, Any], stack: ExitStack
) -> None:
    chance = random.Random(3)
    router = stack.enter_context(running("router", **flags, http_port=0))
    worker = stack.enter_context(running("decode-worker", **worker_flags))
    for ledger in LEDGERS:
        ask(router, ledger, chance)
    until(lambda: blocks(worker, "TIER_SSD") > 64, 20, "blocks have gone down to the SSD")
    on_ssd = blocks(worker, "TIER_SSD")
    worker.kill()
    began_s = time.monotonic()
    worker = stack.enter_context(running("decode-worker", **worker_flags))
    until(lambda: blocks(worker, "TIER_SSD") >= on_ssd * 0.9, 20, "the index is there again")
    took_s = time.monotonic() - began_s
    assert took_s < 30, "most of it is loading torch and the model"
    until(lambda: fetch(f"{router.http}/health")["status"] == "ok", 20, "the router found it")
    cached = [ask(router, ledger, chance) for ledger in LEDGERS]
    assert sum(tokens > 0 for tokens in cached) >= len(LEDGERS) // 3, f"hits from the file: {cached}"


def test_a_worker_fetches_a_prefix_that_another_one_has_below_hbm(
    flags: dict[str, Any], worker_flags: dict[str, Any], stack: ExitStack
) -> None:
    """Asked of the second worker alone, by a plan such as the router makes."""
    from baton.rpc import common_pb2
    from engine.recall.text import build_tokenizer, prompt

    tokens = build_tokenizer()(prompt(LEDGERS[0], sorted(LEDGERS[0].owners)[5]))["input_ids"]
    own = stack.enter_context(running("decode-worker", **worker_flags))
    peer = stack.enter_context(running("decode-worker", **worker_flags))
    first = generate(peer, worker_pb2.Submit(request_id="a", prompt=tokens, sampling=greedy()))
    for number, ledger in enumerate(LEDGERS[1:6]):
        filler = build_tokenizer()(ledger.text)["input_ids"]
        generate(peer, worker_pb2.Submit(request_id=f"f{number}", prompt=filler, sampling=greedy()))
    plan = common_pb2.FetchPlan(
        worker_id="peer", address=peer.grpc, blocks=len(tokens) // 32, block_tokens=32, compute_s=30
    )
    fetched = generate(own, worker_pb2.Submit(request_id="b", prompt=tokens, sampling=greedy(), fetch=plan))
    assert fetched.timeline.fetched_tokens >= len(tokens) - 64
    assert list(fetched.token_ids) == list(first.token_ids)


def greedy() -> Any:
    from baton.rpc import common_pb2

    return common_pb2.SamplingParams(temperature=0, max_tokens=1, seed=1)


def generate(worker: Process, submit: "worker_pb2.Submit") -> "worker_pb2.TokenOutput":
    with grpc.insecure_channel(worker.grpc) as channel:
        stub = worker_pb2_grpc.DecodeWorkerStub(channel)
        for response in stub.Serve(iter([worker_pb2.ServeRequest(submit=submit)]), timeout=60):
            for output in response.outputs:
                assert not output.error, output.error
                return output
    raise AssertionError("the stream ended")
