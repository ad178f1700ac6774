"""Our side of bench.router: the router's own index and placer, given the same work as the peer."""

import random
import time
import tracemalloc
from collections import deque
from collections.abc import Sequence
from itertools import count

from baton.clock import monotonic
from baton.cluster.cache_events import CacheChanges, CacheEvents
from baton.cluster.worker_info import Load, WorkerInfo
from baton.ids import BlockHash, RequestId, WorkerId
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from bench.router_sides import EventFigures
from bench.router_workload import BLOCK_TOKENS, Form, Step, Workload
from router.index.prefix_index import Applied, PrefixIndex
from router.placement.block_names import BlockKind, BlockNames
from router.placement.decision import Decision
from router.placement.placer import Placer
from router.placement.price import PlacementRequest

MODEL = "m"
EPOCH = "1"
KIND = BlockKind("f" * 64, BLOCK_TOKENS, "bfloat16")
BLOCKS_MAX = 4_000_000
EXPECTED_TOKENS = 256.0
LATENCY = WorkerLatency(
    PrefillCost(chunk_s=0.005, token_s=3e-5, token_context_s=2e-9),
    DecodeCost(step_s=0.007, sequence_s=2e-5, kv_token_s=1e-8),
    TransferCost(latency_s=2e-4, bytes_per_s=2e10),
)
"""Of the order of an 8B model's on one large GPU."""


class OwnSide:
    """A prefix index and a placer before it, as a router has them; one thread, no event loop needed."""

    def start(self, workload: Workload, in_flight: int) -> None:
        self._prompts, self._ids, self._in_flight = workload.prompts("select"), count(1), in_flight
        self._placed: deque[RequestId] = deque()
        index = joined(workload)
        workers = [worker_info(workload, number) for number in range(workload.workers)]
        self.placer = Placer(index, "least-added-latency", monotonic, random.Random(0))
        self.placer.set_workers(workers)
        apply(index, Events(workload).stored)

    def select(self, selections: int, form: Form) -> list[float]:
        prompts = [tuple(next(self._prompts)) for _ in range(selections)]
        return [self._timed(prompt, form) for prompt in prompts]

    def events(self, workload: Workload) -> EventFigures:
        events, index = Events(workload), joined(workload)
        stored_s, removed_s = apply(index, events.stored), apply(index, events.removed)
        del index
        return EventFigures.of(workload, stored_s, removed_s, traced_bytes(workload, events.stored))

    def place(self, prompt: Sequence[int]) -> Decision:
        """Reserves nothing."""
        return self.placer.place(PlacementRequest(MODEL, len(prompt), EXPECTED_TOKENS, BlockNames(prompt)), {})

    def _timed(self, prompt: tuple[int, ...], form: Form) -> float:
        """From the prompt, or from the names of its blocks, to a reservation."""
        names = BlockNames(prompt)
        if form == "hashes":
            names(KIND)  # which it keeps
        sequence_id = RequestId(f"s{next(self._ids)}")
        start_s = time.perf_counter()
        request = PlacementRequest(MODEL, len(prompt), EXPECTED_TOKENS, names)
        decision = self.placer.place(request, {})
        self.placer.reserve(sequence_id, decision, request)
        took_s = time.perf_counter() - start_s
        self._placed.append(sequence_id)
        while len(self._placed) > self._in_flight:
            ended = self._placed.popleft()
            self.placer.first_token(ended)
            self.placer.finished(ended)
        return took_s * 1e6


Said = list[tuple[WorkerId, bytes]]
"""Batches of events as they come from Redis, each with the worker that said so."""


def joined(workload: Workload) -> PrefixIndex:
    """An index that knows the workers and that their caches are empty."""
    index = PrefixIndex(BLOCKS_MAX, monotonic)
    for number in range(workload.workers):
        index.join(worker_id(number), EPOCH)
        index.restore(worker_id(number), EPOCH, 0, {})
    return index


def apply(index: PrefixIndex, said: Said) -> float:
    """Seconds; the way of a batch in the router, from its bytes into the index."""
    start_s = time.perf_counter()
    applied = [index.apply(worker, CacheEvents.from_bytes(data)) for worker, data in said]
    took_s = time.perf_counter() - start_s
    assert all(each is Applied.APPLIED for each in applied)
    return took_s


def traced_bytes(workload: Workload, said: Said) -> int:
    """What Python and numpy allocated for the index and have not freed."""
    tracemalloc.start()
    index = joined(workload)
    apply(index, said)
    index_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return index_bytes


class Events:
    """What the workload's workers say, as it comes from Redis."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._sequences = [count(1) for _ in range(workload.workers)]
        self._latest: tuple[int, list[BlockHash]] = (-1, [])  # one conversation's steps come one after the other
        self.stored = [self._said(step) for step in workload.stored()]
        self.removed = [self._said(step) for step in workload.removed()]

    def _said(self, step: Step) -> tuple[WorkerId, bytes]:
        names = tuple(self._names(step.conversation)[step.first : step.end])
        changes = CacheChanges(removed=names) if step.is_removal else CacheChanges(stored={"hbm": names})
        events = CacheEvents.of(EPOCH, next(self._sequences[step.worker]), changes)
        return worker_id(step.worker), events.to_bytes()

    def _names(self, conversation: int) -> list[BlockHash]:
        if self._latest[0] != conversation:
            names = BlockNames(self._workload.conversation(conversation).tokens)(KIND)
            self._latest = conversation, list(names)
        return self._latest[1]


def worker_id(number: int) -> WorkerId:
    return WorkerId(f"worker-{number:03}")


def worker_info(workload: Workload, number: int) -> WorkerInfo:
    """Busy with some sequences, and far from full."""
    is_prefill = workload.pools == 2 and number < workload.workers // 2
    return WorkerInfo(
        worker_id=worker_id(number),
        role="prefill" if is_prefill else "decode",
        state="ready",
        address=f"10.0.0.1:{10_000 + number}",
        model=MODEL,
        fingerprint=KIND.fingerprint,
        context_length=131_072,
        vocabulary_size=128_256,
        block_tokens=BLOCK_TOKENS,
        kv_dtype=KIND.kv_dtype,
        kv_blocks_total=100_000,
        kv_block_bytes=4 * 2**20,
        latency=LATENCY,
        epoch=EPOCH,
        load=Load() if is_prefill else Load(running_sequences=16, kv_blocks_used=1000, kv_tokens=32_000),
    )
