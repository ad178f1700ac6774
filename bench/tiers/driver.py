"""Asks the same prompts when their KV lies in one tier after the other."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import grpc.aio

from baton.layout import DTYPE_BYTES
from baton.rpc import common_pb2, events_pb2, worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS
from bench.decode_calls import RequestFailed, ServeCall, first_output, serving
from bench.load import FIRST_TOKEN_ID
from bench.models import Shape
from bench.tiers.figures import BLOCK_TOKENS, Rate, Sample, Source
from bench.tiers.workers import POOL_BLOCKS

FILLER_TOKENS = 8192
LAPS = 2
"""Of fillers, each as much as the pool holds: what was used again has a second chance."""
FILLER_BLOCKS = FILLER_TOKENS // BLOCK_TOKENS
LINK_TOKENS = 4096
"""Of a filler, which the peer fetches to make its link: what it may take is what computing them would."""
FOUND_SHARE_MIN = 0.9
"""Of a prompt's whole blocks, that lay in the tier."""
COLD_MAX_S = 60.0
SETTLED_POLL_S = 0.1
SETTLED_POLLS_MAX = 100
TIERS: Mapping[Source, "events_pb2.Tier"] = {"ddr": events_pb2.TIER_DDR, "ssd": events_pb2.TIER_SSD}


class Workers(Protocol):
    """By what they are for: `ddr` has host memory below its pool, `ssd` a file as well, `peer` neither."""

    @property
    def addresses(self) -> Mapping[str, str]:
        """Of their gRPC servers."""

    def restart(self, name: str) -> None:
        """Kills it and starts it again; its address is another then."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A prompt whose KV was computed on the worker with an SSD."""

    prompt: Sequence[int]
    salt: str
    turn: int
    cold_s: float


class Driver:
    def __init__(
        self,
        workers: Workers,
        connections: "Connections",
        vocabulary: int,
        seed: int,
    ) -> None:
        self._workers, self._connections, self._vocabulary = workers, connections, vocabulary
        self._random, self._numbers = random.Random(seed), count()
        self._fillers = [self._prompt(FILLER_TOKENS) for _ in range(fillers_for(POOL_BLOCKS["ddr"]))]
        """Prompts whose only use is to push others out; they soon come from lower tiers themselves, which is quick."""
        self._stored: list[Stored] = []

    async def turn(self, tokens: int, turn: int) -> list[Sample]:
        """One prompt, from every source; new to all caches at first."""
        prompt, salt = self._prompt(tokens), f"turn-{next(self._numbers)}"
        cold, cold_s = await self._ask("ddr", prompt, salt)
        samples = [_sample("cold", prompt, turn, cold, cold_s, cold_s)]
        hbm, hbm_s = await self._ask("ddr", prompt, salt)
        samples.append(_sample("hbm", prompt, turn, hbm, hbm_s, cold_s))
        await self._evict()
        samples.append(await self._from_tier("ddr", prompt, salt, turn, cold_s))
        samples.append(await self._from_peer(prompt, salt, turn, cold_s))
        _, ssd_cold_s = await self._ask("ssd", prompt, salt)
        self._stored.append(Stored(prompt, salt, turn, ssd_cold_s))
        return samples

    async def restart(self) -> None:
        """The worker with an SSD is killed, and starts again with nothing but its file."""
        await self._settled("ssd")
        await self._connections.close("ssd")
        self._workers.restart("ssd")
        await self._connections.open("ssd")
        await self._settled("ssd")

    async def from_ssd(self, advance: Callable[[], None]) -> list[Sample]:
        """After `restart`: every prompt once more. The first, in which code is warmed up, does not count."""
        samples = []
        for stored in self._stored:
            samples.append(await self._from_tier("ssd", stored.prompt, stored.salt, stored.turn, stored.cold_s))
            advance()
        return samples[1:]

    async def warm_up(self) -> None:
        """Computes the fillers, and makes the link to the peer."""
        await self._evict()
        for number, filler in enumerate(self._fillers):
            prompt = filler[:LINK_TOKENS]
            sample = await self._from_peer(prompt, filler_salt(number), 0, COLD_MAX_S)
            if sample.is_whole:
                return
        raise RequestFailed("nothing comes from the peer")

    async def _from_tier(self, source: Source, prompt: Sequence[int], salt: str, turn: int, cold_s: float) -> Sample:
        """It must lie there, and nowhere above."""
        whole = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        before = await self._hit_tokens(source)
        output, ttft_s = await self._ask(source, prompt, salt)
        found = await self._hit_tokens(source) - before
        if found < FOUND_SHARE_MIN * whole:
            raise RequestFailed(f"of {whole} tokens only {found} lay in {source}")
        return _sample(source, prompt, turn, output, ttft_s, cold_s)

    async def _from_peer(self, prompt: Sequence[int], salt: str, turn: int, cold_s: float) -> Sample:
        """Its blocks lie in DDR there. What does not come in time is computed: the sample says how much came."""
        await self._evict()
        blocks = (len(prompt) - 1) // BLOCK_TOKENS
        plan = common_pb2.FetchPlan(
            worker_id="peer",
            address=self._workers.addresses["ddr"],
            blocks=blocks,
            block_tokens=BLOCK_TOKENS,
            compute_s=cold_s,
        )
        output, ttft_s = await self._ask("peer", prompt, salt, plan)
        return _sample("peer", prompt, turn, output, ttft_s, cold_s)

    async def _evict(self) -> None:
        """Out of the pool of the worker with DDR alone."""
        for number, filler in LAPS * list(enumerate(self._fillers)):
            await self._ask("ddr", filler, filler_salt(number))
        await self._settled("ddr")

    async def _settled(self, worker: str) -> None:
        """Returns when no block moves on by itself any more."""
        before, now = None, await self._status(worker)
        for _ in range(SETTLED_POLLS_MAX):
            if before is not None and before.tiers == now.tiers:
                return
            await asyncio.sleep(SETTLED_POLL_S)
            before, now = now, await self._status(worker)
        raise RequestFailed(f"the tiers of worker {worker} do not come to rest")

    async def _status(self, worker: str) -> worker_pb2.CacheStatus:
        status: worker_pb2.CacheStatus = await self._connections.stubs[worker].GetCacheStatus(
            worker_pb2.GetCacheStatusRequest()
        )
        return status

    async def _hit_tokens(self, source: Source) -> int:
        status = await self._status(source)
        return sum(tier.hit_tokens for tier in status.tiers if tier.tier == TIERS[source])

    async def _ask(
        self, worker: str, prompt: Sequence[int], salt: str, plan: "common_pb2.FetchPlan | None" = None
    ) -> tuple[worker_pb2.TokenOutput, float]:
        submit = worker_pb2.Submit(
            request_id=f"bench-{next(self._numbers)}",
            prompt=prompt,
            sampling=common_pb2.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, seed=1),
            cache_salt=salt,
            fetch=plan,
        )
        output, ttft_s = await first_output(self._connections.calls[worker], submit)
        if output.error:
            raise RequestFailed(f"worker {worker}, {len(prompt)} tokens: {output.error}")
        return output, ttft_s

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.choices(range(FIRST_TOKEN_ID, self._vocabulary), k=tokens)


def fillers_for(pool_blocks: int) -> int:
    """So many push everything else out of a pool, with one to spare."""
    return -(-pool_blocks // FILLER_BLOCKS) + 1


def filler_salt(number: int) -> str:
    return f"filler-{number}"


def _sample(
    source: Source, prompt: Sequence[int], turn: int, output: worker_pb2.TokenOutput, ttft_s: float, cold_s: float
) -> Sample:
    timeline = output.timeline
    moved_s = timeline.restore_s + timeline.fetch_s
    return Sample(source, len(prompt), turn, output.token_ids[0], ttft_s, cold_s, output.cached_tokens, moved_s)


async def measure(
    workers: Workers, shape: Shape, lengths: Sequence[int], turns: int, seed: int, advance: Callable[[], None]
) -> list[Sample]:
    """Lengths take turns; one turn of the shortest, in which code is warmed up, does not count. `advance` is called
    twice for each length and turn, and twice more."""
    connections = Connections(workers)
    try:
        for name in workers.addresses:
            await connections.open(name)
        driver = Driver(workers, connections, shape.vocabulary, seed)
        await driver.warm_up()
        await driver.turn(min(lengths), -1)
        advance()
        samples = list[Sample]()
        for turn in range(turns):
            for tokens in lengths:
                samples += await driver.turn(tokens, turn)
                advance()
        await driver.restart()
        return samples + await driver.from_ssd(advance)
    finally:
        for name in workers.addresses:
            await connections.close(name)


class Connections:
    """To workers by name."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._open: dict[str, AsyncExitStack] = {}
        self.calls: dict[str, ServeCall] = {}
        self.stubs: dict[str, worker_pb2_grpc.WorkerStub] = {}

    async def open(self, name: str) -> None:
        address = self._workers.addresses[name]
        stack = self._open[name] = AsyncExitStack()
        calls = await stack.enter_async_context(serving({name: address}))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, CHANNEL_OPTIONS))
        self.calls[name], self.stubs[name] = calls[name], worker_pb2_grpc.WorkerStub(channel)

    async def close(self, name: str) -> None:
        """Idempotent."""
        if (stack := self._open.pop(name, None)) is not None:
            await stack.aclose()


def peer_rate(samples: Sequence[Sample], shape: Shape) -> Rate:
    """Of the longest prompts that came whole: bytes over the seconds that the request waited for them. Raises
    RequestFailed where none did."""
    head_dim = shape.hidden // shape.heads
    token_bytes = 2 * shape.layers * shape.kv_heads * head_dim * DTYPE_BYTES[shape.dtype]
    own = [sample for sample in samples if sample.source == "peer" and sample.is_whole]
    if not own:
        raise RequestFailed("no prompt came from the peer as a whole before it could have been computed")
    best = min(own, key=lambda sample: (-sample.tokens, sample.moved_s))
    return Rate("peer", best.reused_tokens * token_bytes / best.moved_s / 1e9)
