"""The self-test of a link: one block's bytes, written over and over in all layers, timed and looked at."""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from baton.clock import Clock, monotonic
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.interface import REPEATS_MAX, Connection, Region, Source

LATENCY_ROUNDS = 7
BULK_S = 0.05
"""About how long the bulk of the test takes: twice as long, or one write, at most."""
BULK_BYTES_MAX = 256 * 2**20
"""And about how much it moves."""
WRITE_BYTES = 2**20
"""About what one write moves in the bulk, as when a chunk's slices leave together."""
SECONDS_MIN = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    size_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.size_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    small: Sample
    """One layer of one block, written and fenced: the median."""
    bulk: Sample
    """The fastest of several, each fenced."""

    @property
    def latency_s(self) -> float:
        return self.small.seconds

    @property
    def bytes_per_s(self) -> float:
        return self.bulk.bytes_per_s

    @property
    def samples(self) -> tuple[Sample, Sample]:
        return self.small, self.bulk

    @classmethod
    def told(cls, latency_s: float, bytes_per_s: float, layout: KVLayout) -> "Measured":
        """What the other side measured, by what it says."""
        return cls(Sample(2 * layout.slice_bytes, latency_s), Sample(max(1, round(bytes_per_s * BULK_S)), BULK_S))


def fill_source(region: Region, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
    """Random bytes into the block that others are tested with; once, before the first link. Any thread."""
    _fill(region, region.layout.probe_source, random_bytes)


def clear_target(region: Region) -> None:
    """Zeroes where others write, so that what an earlier test left cannot pass for this one's."""
    _fill(region, region.layout.probe_target, bytes)


def _fill(region: Region, block: BlockId, content: Callable[[int], bytes]) -> None:
    layout = region.layout
    for layer in range(layout.layers):
        for kv in (0, 1):
            view = region.writable(layer, kv, block, 1)
            view[:] = content(layout.slice_bytes)
            region.written(layer, kv, block, 1, view)


async def digest_of(region: Source, block: BlockId) -> int:
    """As it lies now; computed in a thread."""
    (digest,) = await asyncio.to_thread(region.digests, [block])
    return int(digest)


def bulk_repeats(layout: KVLayout) -> int:
    """How often one write of the bulk names the block."""
    return min(max(1, WRITE_BYTES // (2 * layout.slice_bytes)), REPEATS_MAX)


def bulk_write_bytes(layout: KVLayout) -> int:
    """Of one write of the bulk."""
    return bulk_repeats(layout) * 2 * layout.slice_bytes


class Prober:
    """The sender's side: writes to the receiver's probe block by a connection that is its own."""

    def __init__(self, connection: Connection, source: BlockId, target: KVLayout, clock: Clock = monotonic) -> None:
        """`target` is the receiver's."""
        self._connection, self._clock = connection, clock
        self._source, self._target = source, target.probe_target
        self._layers, self._layer_bytes = target.layers, 2 * target.slice_bytes
        self._repeats = bulk_repeats(target)

    async def measure(self) -> Measured:
        """Ends with the whole block in place. Raises TransferError as the connection does."""
        every_layer = range(self._layers)
        await self._timed(every_layer, 1)  # not counted: pages are touched, and buffers made, for the first time
        small = [await self._timed(range(1), 1) for _ in range(LATENCY_ROUNDS)]
        latency_s = median(sample.seconds for sample in small)
        return Measured(Sample(self._layer_bytes, latency_s), await self._bulk())

    async def _bulk(self) -> Sample:
        """Twice as much again and again, so that in the end one fence is little beside what it waits for."""
        best, writes, spent_s, moved_bytes = None, 1, 0.0, 0
        while best is None or (spent_s < BULK_S and moved_bytes < BULK_BYTES_MAX):
            sample = await self._timed([write % self._layers for write in range(writes)], self._repeats)
            if best is None or sample.bytes_per_s > best.bytes_per_s:
                best = sample
            spent_s, moved_bytes, writes = spent_s + sample.seconds, moved_bytes + sample.size_bytes, 2 * writes
        return best

    async def _timed(self, layers: Sequence[int], repeats: int) -> Sample:
        """One write in each of these layers, and one fence."""
        started_s = self._clock()
        for layer in layers:
            await self._connection.write(layer, [self._source] * repeats, [self._target] * repeats)
        await self._connection.fence()
        seconds = max(self._clock() - started_s, SECONDS_MIN)
        return Sample(repeats * len(layers) * self._layer_bytes, seconds)
