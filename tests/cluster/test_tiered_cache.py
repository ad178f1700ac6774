"""Tiers below HBM in real processes: killed with -9 and started again on the same file, and peers that fetch.

The model is the recall model: one wrong KV block would show as a wrong name.
"""

import asyncio
import os
import queue
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.cluster.cache_events import unpack
from baton.cluster.redis_client import connect_redis
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS, Tier
from baton.rpc import common_pb2, events_pb2, worker_pb2, worker_pb2_grpc
from engine.filled_blocks import RESERVED_DIVISOR
from engine.recall.text import Ledger, build_tokenizer, make_ledger, prompt, question
from kvcache.directory.directory import Directory
from tests.cluster.processes import PATIENCE_S, Process, fetch, free_port, metric, running, until

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


def start(stack: ExitStack, processes: Sequence[AbstractContextManager[Process]]) -> list[Process]:
    """All at once."""
    with ThreadPoolExecutor(len(processes)) as starters:
        return list(starters.map(stack.enter_context, processes))


def blocks(worker: Process, tier: "events_pb2.Tier") -> int:
    with grpc.insecure_channel(worker.grpc) as channel:
        status = worker_pb2_grpc.WorkerStub(channel).GetCacheStatus(
            worker_pb2.GetCacheStatusRequest(), timeout=PATIENCE_S
        )
    return sum(each.blocks for each in status.tiers if each.tier == tier)


def test_a_worker_killed_and_started_again_on_its_file_serves_hits_from_it(
    flags: dict[str, Any], worker_flags: dict[str, Any], stack: ExitStack
) -> None:
    chance = random.Random(3)
    router = stack.enter_context(running("router", **flags, http_port=0))
    worker = stack.enter_context(running("decode-worker", **worker_flags))
    until(lambda: known(router), PATIENCE_S, "the router found the worker")
    for ledger in LEDGERS:
        ask(router, ledger, chance)
    until(lambda: blocks(worker, events_pb2.TIER_SSD) > 64, PATIENCE_S, "blocks have gone down to the SSD")
    on_ssd = blocks(worker, events_pb2.TIER_SSD)
    worker.kill()
    worker = stack.enter_context(running("decode-worker", **worker_flags))
    until(lambda: blocks(worker, events_pb2.TIER_SSD) >= on_ssd * 0.9, 30, "the index is there again")
    until(lambda: known(router), PATIENCE_S, "the router found it")
    cached = [ask(router, ledger, chance) for ledger in LEDGERS]
    assert sum(tokens > 0 for tokens in cached) >= len(LEDGERS) // 3, f"hits from the file: {cached}"


def test_a_worker_fetches_a_prefix_that_another_one_has_below_hbm(
    worker_flags: dict[str, Any], stack: ExitStack
) -> None:
    """Asked of the workers alone, with plans such as the router makes. The first one has the link made, and does not
    wait for it; the tokens are right in any case."""
    metrics_port = free_port()
    own_flags = {**worker_flags, "kv_blocks": 8 * POOL_BLOCKS, "metrics_port": metrics_port}  # room for whole prompts
    own, peer = start(
        stack,
        [
            running("decode-worker", **own_flags, worker_id="own"),
            running("decode-worker", **worker_flags, worker_id="peer"),
        ],
    )
    tokenize = build_tokenizer()
    prompts = [tokenize(prompt(ledger, min(ledger.owners)))["input_ids"] for ledger in LEDGERS[:8]]
    first = [generate(peer, f"peer-{index}", tokens) for index, tokens in enumerate(prompts)]
    fetched = []
    for index, tokens in enumerate(prompts):
        plan = common_pb2.FetchPlan(
            worker_id="peer", address=peer.grpc, blocks=len(tokens) // 32, block_tokens=32, compute_s=30
        )
        output = generate(own, f"own-{index}", tokens, plan)
        assert list(output.token_ids) == list(first[index].token_ids)
        fetched.append(output.timeline.fetched_tokens)
        until(lambda: metric(metrics_port, "baton_kv_links") > 0, PATIENCE_S, "there is a link to the peer")
    assert fetched[0] == 0, "nobody waits for a link"
    assert max(fetched) >= POOL_BLOCKS // RESERVED_DIVISOR * 32, f"as much as is brought up at one time: {fetched}"
    assert blocks(peer, events_pb2.TIER_HBM) <= POOL_BLOCKS < sum(len(tokens) // 32 for tokens in prompts)


def generate(
    worker: Process, request_id: str, tokens: Sequence[int], fetch_plan: common_pb2.FetchPlan | None = None
) -> worker_pb2.TokenOutput:
    """Its first output. The stream stays open until then: its end would end the request."""
    greedy = common_pb2.SamplingParams(temperature=0, max_tokens=1, seed=1)
    submit = worker_pb2.Submit(request_id=request_id, prompt=tokens, sampling=greedy, fetch=fetch_plan)
    requests: queue.SimpleQueue[worker_pb2.ServeRequest | None] = queue.SimpleQueue()
    requests.put(worker_pb2.ServeRequest(submit=submit))
    with grpc.insecure_channel(worker.grpc) as channel:
        try:
            for response in worker_pb2_grpc.DecodeWorkerStub(channel).Serve(
                iter(requests.get, None), timeout=2 * PATIENCE_S
            ):
                for output in response.outputs:
                    assert not output.error, output.error
                    return output
        finally:
            requests.put(None)
    raise AssertionError("the stream ended")


# ---- Redis killed and started again empty

Where = Mapping[BlockHash, Tier]


class Load:
    """Asks, two at a time, until it is told to stop; remembers what failed."""

    def __init__(self, router: Process) -> None:
        self._router, self._is_over = router, threading.Event()
        self.answers, self.failures = 0, list[str]()
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(2)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._is_over.is_set():
            try:
                ask(self._router, chance.choice(LEDGERS), chance)
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
            self.answers += 1

    def go_on(self, answers: int) -> None:
        wanted = self.answers + answers
        until(lambda: self.answers >= wanted, 4 * PATIENCE_S, f"{answers} more requests were answered")

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def inventory(worker: Process) -> Where:
    with grpc.insecure_channel(worker.grpc) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        sets = [
            each
            for message in stub.GetCacheSnapshot(worker_pb2.GetCacheSnapshotRequest(), timeout=PATIENCE_S)
            for each in message.blocks
        ]
    return {name: TIERS[each.tier - events_pb2.TIER_HBM] for each in sets for name in unpack(each.block_hashes)}


def directory(flags: Mapping[str, Any], names: Sequence[BlockHash]) -> dict[WorkerId, Where]:
    """What it says of these blocks; nothing of all where it does not answer in time."""

    async def look_up() -> list[list[Any]]:
        redis = await connect_redis(flags["redis_url"])
        try:
            reader = Directory(redis, flags["key_prefix"], WorkerId("reader"), "0", dict)
            parts = [await reader.holders(names[at : at + 2048]) for at in range(0, len(names), 2048)]
            return [holders for part in parts for holders in part]
        finally:
            await redis.aclose()

    found: dict[WorkerId, dict[BlockHash, Tier]] = {}
    for name, holders in zip(names, asyncio.run(look_up()), strict=False):
        for holder in holders:
            found.setdefault(holder.worker_id, {})[name] = holder.tier
    return dict(found)


def test_redis_killed_under_load_and_back_empty_knows_every_block_again(
    worker_flags: dict[str, Any], stack: ExitStack
) -> None:
    with EmbeddedRedis() as redis:
        flags = {"redis_url": redis.url, "key_prefix": "back"}
        worker_flags |= {**flags, "ssd_bytes": 48 * BLOCK_BYTES, "self_test": False}
        commands = {"prefill-0": "prefill-worker", "decode-0": "decode-worker", "decode-1": "decode-worker"}
        processes = [running(command, **worker_flags, worker_id=name) for name, command in commands.items()]
        *started, router = start(stack, [*processes, running("router", **flags, model="recall", http_port=0)])
        workers = dict(zip(map(WorkerId, commands), started, strict=True))
        until(lambda: len(known(router)) == len(workers), PATIENCE_S, "the router found the workers")
        load = Load(router)
        load.go_on(24)
        ever = {name for worker in workers.values() for name in inventory(worker)}
        os.kill(redis.pid, signal.SIGKILL)
        until(lambda: not redis.is_running, PATIENCE_S, "Redis is gone")
        load.go_on(12)
        redis.start()
        load.go_on(12)
        until(lambda: ever.difference(*map(inventory, started)), 4 * PATIENCE_S, "some blocks are nowhere any more")
        load.stop()
        assert not load.failures
        until(lambda: agree(flags, workers, ever), 10, "the directory is the workers' inventory")
        held = [inventory(worker) for worker in workers.values()]
        assert {tier for where in held for tier in where.values()} == {"hbm", "ddr", "ssd"}
        stack.close()


def known(router: Process) -> list[Any]:
    return [worker for worker in fetch(f"{router.http}/v1/workers")["data"] if worker["reachable"]]


def agree(flags: Mapping[str, Any], workers: Mapping[WorkerId, Process], ever: set[BlockHash]) -> bool:
    """Block by block and tier by tier, of those too that lay somewhere once. What a worker says lies in HBM is as much
    as its engine counts there."""
    held = {worker_id: inventory(worker) for worker_id, worker in workers.items()}
    for worker_id, where in held.items():
        in_hbm = sum(tier == "hbm" for tier in where.values())
        if in_hbm > blocks(workers[worker_id], events_pb2.TIER_HBM):
            return False
    return directory(flags, sorted(ever.union(*held.values()))) == held
