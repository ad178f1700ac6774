"""Asks decode workers as routers do, one request at a time, and says how long the first token took."""

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count

from baton.rpc import common_pb2, worker_pb2
from bench.decode_calls import RequestFailed, ServeCall, first_output, serving
from bench.handoff_cluster import Cluster
from bench.handoff_figures import Row, Sample, Way
from bench.load import FIRST_TOKEN_ID

WAYS: Mapping[Way, tuple[str, str | None]] = {
    "local": ("always", None),
    "streamed": ("always", "streamed"),
    "send_after": ("always", "after_prefill"),
    "streamed_unverified": ("never", "streamed"),
}
"""By the decode worker that is asked, and the prefill worker that it is to ask."""


class Driver:
    def __init__(self, cluster: Cluster, calls: Mapping[str, ServeCall], vocabulary: int, seed: int) -> None:
        self._cluster, self._calls, self._vocabulary = cluster, calls, vocabulary
        self._random, self._numbers = random.Random(seed), count()

    @property
    def ways(self) -> list[Way]:
        """That this cluster has workers for."""
        has_decode, has_prefill = self._cluster.decode, (None, *self._cluster.prefill)
        return [way for way, (decode, prefill) in WAYS.items() if decode in has_decode and prefill in has_prefill]

    async def turn(self, tokens: int, first: int) -> list[Sample]:
        """The same prompt in each way, beginning with the `first`; in each it is new to every cache."""
        prompt = self._random.choices(range(FIRST_TOKEN_ID, self._vocabulary), k=tokens)
        ways = self.ways
        return [await self._ask(ways[(first + i) % len(ways)], prompt) for i in range(len(ways))]

    async def _ask(self, way: Way, prompt: Sequence[int]) -> Sample:
        decode, prefill = WAYS[way]
        call, request_id = self._calls[decode], f"bench-{next(self._numbers)}"
        submit = worker_pb2.Submit(
            request_id=request_id,
            prompt=prompt,
            sampling=common_pb2.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, seed=1),
            cache_salt=request_id,  # what names blocks: so none is found in a cache
        )
        if prefill is not None:
            submit.prefill_candidates.add(worker_id=prefill, address=self._cluster.prefill[prefill])
        output, ttft_s = await first_output(call, submit)
        wanted = "" if prefill is None else self._cluster.transport
        if output.error or output.timeline.transport != wanted:
            reason = output.error or f"it came by {output.timeline.transport or 'no transport'} instead"
            raise RequestFailed(f"{way}, {len(prompt)} tokens: {reason}")
        return sample_of(way, len(prompt), output, ttft_s)


def sample_of(way: Way, tokens: int, output: worker_pb2.TokenOutput, ttft_s: float) -> Sample:
    timeline = output.timeline
    return Sample(
        way,
        tokens,
        output.token_ids[0],
        ttft_s,
        timeline.queue_s,
        timeline.prefill_queue_s,
        timeline.prefill_s,
        timeline.transfer_s,
        timeline.transfer_exposed_s,
        timeline.transfer_bytes,
        timeline.transport,
    )


@asynccontextmanager
async def driving(cluster: Cluster, vocabulary: int, seed: int) -> AsyncIterator[Driver]:
    async with serving(cluster.decode) as calls:
        yield Driver(cluster, calls, vocabulary, seed)


async def measure(
    driver: Driver, link: str, lengths: Sequence[int], repeats: int, advance: Callable[[], None]
) -> list[Row]:
    """Lengths and ways take turns; one turn of each, in which links are made and code is warmed up, does not count."""
    turns: dict[int, list[Sample]] = {tokens: [] for tokens in lengths}
    for number in range(-1, repeats):
        for tokens in lengths:
            samples = await driver.turn(tokens, first=max(0, number))
            if number >= 0:
                turns[tokens] += samples
            advance()
    return [Row(link, tokens, samples) for tokens, samples in turns.items()]
