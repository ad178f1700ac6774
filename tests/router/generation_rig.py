"""Generations on fake decode workers, without a front door."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from fake_worker import FakeDecodeWorker
from listed_membership import ListedMembership
from prometheus_client import CollectorRegistry

from baton.clock import monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.ids import RequestId
from baton.sampling import PositionLogprobs, SamplingParams
from router.cooldown import Cooldowns
from router.generation import Generation, Generator, Usage
from router.index.prefix_index import PrefixIndex
from router.metrics import RouterMetrics
from router.placement.decision_log import DecisionLog
from router.placement.placer import Placer
from router.sequence import Delta, SequenceRequest, join
from router.text.tokenizer import Tokenizer
from router.worker_pool import WorkerPool

REQUEST = RequestId("r")
TIMEOUT_S = 60.0


class Rig:
    def __init__(self, directory: Path, workers: Sequence[WorkerInfo], options: dict[str, Any]) -> None:
        self.membership, self.registry = ListedMembership(workers), CollectorRegistry()
        self.index = index = PrefixIndex(10_000, monotonic)
        self.placer = Placer(index, "least-added-latency", monotonic, Random(1))

        def on_change(usable: Sequence[WorkerInfo]) -> None:
            for worker in usable:
                index.join(worker.worker_id, worker.epoch)
            self.placer.set_workers(usable)

        self.pool = WorkerPool(self.membership, monotonic, (0.01,), on_change)
        self.decisions = DecisionLog(100, "router-1", lambda: 0.0)
        defaults = {"request_timeout_s": 60.0, "failover_max": 3, "failover_wait_s": 5.0}
        self.generator = Generator(
            "m",
            Tokenizer.load(directory),
            self.pool,
            self.placer,
            self.decisions,
            Cooldowns(monotonic),
            RouterMetrics(self.registry).of("m"),
            monotonic,
            **{**defaults, **options},
        )

    async def until_usable(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.pool.usable("m")) != count:
                await self.pool.changed()

    def start(
        self, *sequences: SequenceRequest, request_id: RequestId = REQUEST, deadline_s: float | None = None
    ) -> Generation:
        return self.generator.start(request_id, sequences, monotonic(), deadline_s)

    async def run(self, *sequences: SequenceRequest, **options: Any) -> tuple[list[Delta], Usage]:
        """Each sequence's whole answer, and the usage."""
        generation = self.start(*sequences, **options)
        try:
            return await collect(generation), generation.usage
        finally:
            generation.close()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model": "m", **labels}) or 0.0

    def attempts(self, request_id: RequestId = REQUEST) -> list[tuple[int, int, str, str]]:
        """Choice, attempt, decode worker and outcome of the request's placements."""
        decision = self.decisions.get(request_id)
        assert decision is not None
        return [
            (one.choice, one.attempt, one.candidates[0].decode_worker, one.actual.outcome)
            for one in decision.placements
        ]


async def collect(generation: Generation) -> list[Delta]:
    deltas: list[list[Delta]] = [[] for _ in generation.sequences]
    async with asyncio.timeout(TIMEOUT_S):
        while (item := await generation.next()) is not None:
            deltas[item[0]].append(item[1])
    return [join(parts) for parts in deltas]


@asynccontextmanager
async def generating(directory: Path, *workers: FakeDecodeWorker, **options: Any) -> AsyncIterator[Rig]:
    """Starts the workers and connects to them; `options` are the Generator's."""
    async with asyncio.TaskGroup() as starting:
        for worker in workers:
            starting.create_task(worker.start())
    rig = Rig(directory, [worker.info for worker in workers], options)
    await rig.pool.start()
    try:
        await rig.until_usable(len(workers))
        yield rig
    finally:
        await rig.pool.stop()
        for worker in workers:
            await worker.stop()


def ask(prompt: str = "hello", seed: int = 1, max_tokens: int = 20, **fields: Any) -> SequenceRequest:
    """The prompt's token ids are its characters' codes modulo 400."""
    sampling: dict[str, Any] = fields.pop("sampling", {})
    return SequenceRequest(
        prompt=tuple(ord(character) % 400 for character in prompt),
        sampling=SamplingParams(seed=seed, max_tokens=max_tokens, **sampling),
        **fields,
    )


def without_timeline(delta: Delta) -> tuple[str, tuple[int, ...], tuple[PositionLogprobs, ...], object, object, object]:
    return (
        delta.text,
        delta.token_ids,
        delta.logprobs,
        delta.finish_reason,
        delta.stop_reason,
        delta.prompt_logprobs,
    )
