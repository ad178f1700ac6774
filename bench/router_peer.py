"""The peer's side of bench.router, run by the peer's own interpreter: NVIDIA Dynamo's selection service and radix tree.

Reads one JSON command a line from standard input and answers each with one JSON line. It imports nothing of Baton
but the workload. Written against ai-dynamo-runtime 1.6.1.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from typing import Any, TextIO

import uvloop
from dynamo._core import RadixTree, SelectionService, compute_block_hash_for_seq  # type: ignore[import-not-found]

from bench.router_workload import BLOCK_TOKENS, Form, Step, Workload

MODEL = "m"
ALL, PREFILL, DECODE = "all", "prefill", "decode"
"""Routing groups."""
INDEX_TIMEOUT_S = 60.0
Json = dict[str, Any]


class Names:
    """Numbers for blocks, given by their chains: what an engine names them is any 64 bits."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def of(self, contents: list[int]) -> list[int]:
        names, previous = [], 0
        for content in contents:
            previous = self._known.setdefault((previous, content), len(self._known) + 1)
            names.append(previous)
        return names


class Selections:
    """A selection service whose index holds the workload's blocks.

    They come in through the service's own recovery: another service's dump over HTTP, as when a replica starts.
    """

    def __init__(self, workload: Workload, in_flight: int) -> None:
        self._workload, self._in_flight = workload, in_flight
        self._blocks, self._ids = Blocks(workload), count(1)
        self._prompts = workload.prompts("select")
        self._placed: deque[list[str]] = deque()
        with serving_dump(self._dump()) as url:
            self._service = SelectionService(indexer_peers=[url])

    async def start(self) -> None:
        for worker in range(self._workload.workers):
            await self._service.upsert_worker(
                {
                    "worker_id": worker,
                    "model_name": MODEL,
                    "routing_group": group_of(self._workload, worker),
                    "endpoint": f"http://worker-{worker}",
                    "kv_events_endpoint": "tcp://127.0.0.1:9",  # nobody publishes there
                    "block_size": BLOCK_TOKENS,
                    "total_kv_blocks": 100_000,
                    "max_num_batched_tokens": 8192,
                }
            )
        await self._until_indexed()

    async def select(self, selections: int, form: Form) -> list[float]:
        """Microseconds of each. What was placed `in_flight` selections ago ends in between, untimed."""
        requests = [self._request(next(self._prompts), form) for _ in range(selections)]
        return [await self._timed(request) for request in requests]

    def stop(self) -> None:
        self._service.shutdown()

    async def _timed(self, request: Json) -> float:
        groups = (ALL,) if self._workload.pools == 1 else (PREFILL, DECODE)
        each = [request | {"routing_group": group, "selection_id": f"s{next(self._ids)}"} for group in groups]
        start_s = time.perf_counter()
        for one in each:
            await self._service.select_and_reserve(one)
        took_s = time.perf_counter() - start_s
        self._placed.append([one["selection_id"] for one in each])
        while len(self._placed) > self._in_flight:
            for selection_id in self._placed.popleft():
                await self._service.prefill_complete(selection_id)
                await self._service.free_reservation(selection_id)
        return took_s * 1e6

    def _request(self, tokens: list[int], form: Form) -> Json:
        if form == "tokens":
            return {"model_name": MODEL, "token_ids": tokens}
        contents = signed(compute_block_hash_for_seq(tokens, BLOCK_TOKENS))
        names = self._blocks.names.of(contents)
        return {"model_name": MODEL, "block_hashes": contents, "sequence_hashes": names, "isl_tokens": len(tokens)}

    def _dump(self) -> Json:
        events: dict[str, list[Json]] = {}
        for worker, event in events_of(self._workload.stored(), self._blocks):
            events.setdefault(group_of(self._workload, worker), []).append({"worker_id": worker, "event": event})
        return {f"{MODEL}:{group}": {"block_size": BLOCK_TOKENS, "events": each} for group, each in events.items()}

    async def _until_indexed(self) -> None:
        """Recovery returns when events are queued, not when they are in the index; the last is a conversation's."""
        last = self._workload.conversation(self._workload.conversations - 1)
        request = self._request(last.tokens, "hashes")
        deadline_s = time.monotonic() + INDEX_TIMEOUT_S
        for holder in last.holders:
            while await self._held(request | {"routing_group": group_of(self._workload, holder)}, holder) == 0:
                assert time.monotonic() < deadline_s, "the peer's index does not hold what it was told"

    async def _held(self, request: Json, worker: int) -> int:
        scores = await self._service.overlap_scores(request)
        blocks = {row["worker_id"]: row["device_blocks"] for row in scores["workers"]}
        return int(blocks[worker]) - self._workload.shared_blocks


def group_of(workload: Workload, worker: int) -> str:
    if workload.pools == 1:
        return ALL
    return PREFILL if worker < workload.workers // 2 else DECODE


class Blocks:
    """The workload's conversations as the peer names blocks: by content, and by an engine's own number."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self.names = workload, Names()
        self._latest: tuple[int, list[int], list[int]] = (
            -1,
            [],
            [],
        )  # one conversation's steps come one after the other

    def of(self, conversation: int) -> tuple[list[int], list[int]]:
        """Contents and names."""
        if self._latest[0] != conversation:
            tokens = self._workload.conversation(conversation).tokens
            contents = compute_block_hash_for_seq(tokens, BLOCK_TOKENS)
            self._latest = conversation, contents, self.names.of(signed(contents))
        return self._latest[1:]


def events_of(steps: Iterable[Step], blocks: Blocks) -> Iterator[tuple[int, Json]]:
    """Each with the worker that says so."""
    ids: defaultdict[int, count[int]] = defaultdict(lambda: count(1))
    for step in steps:
        contents, names = blocks.of(step.conversation)
        if step.is_removal:
            data: Json = {"removed": {"block_hashes": names[step.first : step.end]}}
        else:
            stored = [{"block_hash": names[i], "tokens_hash": contents[i]} for i in range(step.first, step.end)]
            data = {"stored": {"parent_hash": names[step.first - 1] if step.first else None, "blocks": stored}}
        yield step.worker, {"event_id": next(ids[step.worker]), "data": data, "dp_rank": 0}


def signed(hashes: list[int]) -> list[int]:
    """The service takes signed 64-bit numbers, events unsigned ones."""
    return [each - (1 << 64) if each >> 63 else each for each in hashes]


@contextmanager
def serving_dump(dump: Json) -> Iterator[str]:
    body = json.dumps(dump).encode()

    class Dump(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Dump)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Events:
    """The radix tree fed with the workload's events, from bytes."""

    def __init__(self, workload: Workload) -> None:
        blocks = Blocks(workload)
        self._stored = list(map(encoded, events_of(workload.stored(), blocks)))
        self._removed = list(map(encoded, events_of(workload.removed(), blocks)))
        kept = workload.conversation(1)
        self._kept, self._holders = compute_block_hash_for_seq(kept.tokens, BLOCK_TOKENS), kept.holders

    def apply(self) -> tuple[float, float, int]:
        """Seconds until all is stored in a tree that was empty, and until every other conversation is removed from it;
        and the bytes that the process grew by when a tree before it was filled, which also warmed everything up."""
        before_bytes, first, second = resident_bytes(), RadixTree(), RadixTree()
        self._timed(first, self._stored)
        grown_bytes = resident_bytes() - before_bytes
        return self._timed(second, self._stored), self._timed(second, self._removed), grown_bytes

    def _timed(self, tree: Any, events: list[tuple[int, bytes]]) -> float:
        start_s = time.perf_counter()
        for worker, event in events:
            tree.apply_event(worker, event)
        scores = tree.find_matches(self._kept).scores  # the tree's thread answers when it has applied what came before
        took_s = time.perf_counter() - start_s
        assert all(scores.get((worker, 0)) for worker in self._holders)
        return took_s


def encoded(said: tuple[int, Json]) -> tuple[int, bytes]:
    return said[0], json.dumps(said[1], separators=(",", ":")).encode()


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def serve(commands: TextIO, answers: TextIO) -> None:
    selections: Selections | None = None
    for line in commands:
        command = json.loads(line)
        match command.pop("do"):
            case "start":
                if selections is not None:
                    selections.stop()
                in_flight = command.pop("in_flight")
                selections = Selections(Workload(**command), in_flight)
                await selections.start()
                answer: Any = None
            case "select":
                assert selections is not None
                answer = await selections.select(**command)
            case "events":
                answer = Events(Workload(**command)).apply()
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints goes where errors go
    uvloop.run(serve(sys.stdin, answers))


if __name__ == "__main__":
    main()
