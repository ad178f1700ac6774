"""The directory of blocks in Redis, and each worker's index: `python -m bench.directory [--json]`.

How much memory the directory takes by blocks, holders of each and buckets, and how fast workers tell and ask. Against a
Redis of its own, on one connection, one call at a time. A size for which this machine has not the memory is
extrapolated from the two largest that it has, and said to be so. Then a worker's own index of as many blocks
(bench/tier_index.py), in processor time of one thread.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Annotated, Any

import psutil
import redis
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.cluster.cache_events import unpack
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import WorkerId
from bench.measure import percentile
from bench.tier_index import LOOKED_UP, IndexCost, measure_index
from bench.wide import wide_console
from kvcache.directory import calls
from kvcache.directory.calls import Call, Identity, Scope, Sync
from kvcache.directory.scripts import BUCKET_DIGITS, NAMES_MAX, scripts

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
HOLDERS = 3
OTHER_DIGITS = (3, 5)
"""Hex digits that make the bucket, beside those of the directory itself."""
BUCKETS_SIZE = 1_000_000
"""At which these are compared."""
BYTES_PER_BLOCK_MAX = 100
"""What a block may take, to judge whether a size fits in memory."""
LOOK_UPS = 200
LEASE_MS = 3_600_000
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Memory:
    blocks: int
    holders: int
    buckets: int
    bytes_per_block: float
    total_bytes: int
    is_measured: bool = True


@dataclass(frozen=True, slots=True)
class Speed:
    """Of calls of 512 names, the round trip included."""

    what: str
    blocks: int
    """In the directory."""
    p50_s: float
    p99_s: float
    redis_cpu_s: float
    """That Redis itself computes, on average: what bounds how many calls a second it answers."""
    names_per_s: float


@dataclass(slots=True)
class Results:
    memory: list[Memory]
    speed: list[Speed]
    index: list[IndexCost] = field(default_factory=list)


class Filling:
    """One directory that grows, by one holder after another."""

    def __init__(self, client: "redis.Redis", blocks: int, digits: int, advance: Advance) -> None:
        self._client, self._blocks, self._advance = client, blocks, advance
        self._scope = Scope("bench", scripts=scripts(digits))
        client.flushall()
        self._empty_bytes = self._used_bytes()

    def names(self) -> Iterator[bytes]:
        """The same each time, as much at once as goes into one call."""
        drawn = random.Random(self._blocks)
        for at in range(0, self._blocks, NAMES_MAX):
            yield drawn.randbytes(16 * min(NAMES_MAX, self._blocks - at))

    def fill(self, holder: int) -> Speed:
        who = self._register(WorkerId(f"worker-{holder}"))
        tell = (
            calls.sync(self._scope, who, Sync(number, int(time.time() * 1000), {"ddr": names}), LEASE_MS)
            for number, names in enumerate(self.names(), 1)
        )
        return self._timed(f"tell, {holder} held them before" if holder else "tell", tell)

    def look_up(self) -> Speed:
        some = (names for _, names in zip(range(LOOK_UPS), self.names(), strict=False))
        return self._timed("ask", (calls.look_up(self._scope, unpack(names)) for names in some))

    def memory(self, holders: int, digits: int) -> Memory:
        used = self._used_bytes() - self._empty_bytes
        return Memory(self._blocks, holders, 16**digits, used / self._blocks, used)

    def _register(self, worker: WorkerId) -> Identity:
        call = calls.register(self._scope, worker, "epoch", "token", True, LEASE_MS)
        return Identity(self._carry_out(call)[2], "token")

    def _timed(self, what: str, made: Iterator[Call]) -> Speed:
        seconds, cpu_s = [], self._cpu_s()
        for call in made:
            start_s = time.perf_counter()
            answer = self._carry_out(call)
            seconds.append(time.perf_counter() - start_s)
            assert answer[0] != b"unknown"
            self._advance(1)
        each_cpu_s = (self._cpu_s() - cpu_s) / len(seconds)
        names_per_s = min(NAMES_MAX, self._blocks) * len(seconds) / sum(seconds)
        return Speed(what, self._blocks, median(seconds), percentile(seconds, 99) or 0.0, each_cpu_s, names_per_s)

    def _carry_out(self, call: Call) -> Any:
        return self._client.eval(call.script.source, 1, call.key, *call.arguments)

    def _cpu_s(self) -> float:
        used = self._client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def _used_bytes(self) -> int:
        return int(self._client.info("memory")["used_memory"])


def measure(client: "redis.Redis", sizes: Sequence[int], advance: Advance) -> Results:
    results = Results([], [])
    for blocks in sizes:
        filling = Filling(client, blocks, BUCKET_DIGITS, advance)
        for holder in range(HOLDERS):
            speed = filling.fill(holder)
            if holder in (0, HOLDERS - 1):
                results.speed.append(speed)
                results.memory.append(filling.memory(holder + 1, BUCKET_DIGITS))
        results.speed.append(filling.look_up())
    return results


def compare_buckets(client: "redis.Redis", blocks: int, results: Results, advance: Advance) -> None:
    for digits in OTHER_DIGITS:
        filling = Filling(client, blocks, digits, advance)
        filling.fill(0)
        results.memory.append(filling.memory(1, digits))


def extrapolate(memory: Sequence[Memory], blocks: int) -> list[Memory]:
    """So many bytes for the buckets and so many more a block, from the two largest sizes of each kind."""
    found = []
    for holders in (1, HOLDERS):
        *_, smaller, larger = sorted(
            (m for m in memory if m.holders == holders and m.buckets == 16**BUCKET_DIGITS), key=lambda m: m.blocks
        )
        slope = (larger.total_bytes - smaller.total_bytes) / (larger.blocks - smaller.blocks)
        total = larger.total_bytes + slope * (blocks - larger.blocks)
        found.append(Memory(blocks, holders, larger.buckets, total / blocks, round(total), is_measured=False))
    return found


def fits(blocks: int) -> bool:
    return blocks * BYTES_PER_BLOCK_MAX < psutil.virtual_memory().available / 2


def memory_table(memory: Sequence[Memory]) -> Table:
    made = Table(title="Memory of Redis", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("blocks", "holders", "buckets", "bytes a block", "MB", ""):
        made.add_column(heading, justify="right")
    for m in memory:
        note = "" if m.is_measured else "extrapolated"
        figures = (f"{m.blocks:,}", str(m.holders), f"{m.buckets:,}", f"{m.bytes_per_block:.1f}")
        made.add_row(*figures, f"{m.total_bytes / 1e6:,.1f}", note)
    return made


def speed_table(speed: Sequence[Speed]) -> Table:
    made = Table(title=f"Calls of {NAMES_MAX} names", title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("")
    for heading in ("blocks", "p50 ms", "p99 ms", "CPU ms of Redis", "names/s"):
        made.add_column(heading, justify="right")
    for s in speed:
        times = (f"{seconds * 1000:.2f}" for seconds in (s.p50_s, s.p99_s, s.redis_cpu_s))
        made.add_row(s.what, f"{s.blocks:,}", *times, f"{s.names_per_s:,.0f}")
    return made


def index_table(costs: Sequence[IndexCost]) -> Table:
    made = Table(title="A worker's index", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("blocks", "bytes a block", "MB", "add us", f"find us (of {LOOKED_UP})", "remove us"):
        made.add_column(heading, justify="right")
    for c in costs:
        times = (f"{1e6 * seconds:.2f}" for seconds in (c.add_s, c.find_s, c.remove_s))
        made.add_row(f"{c.blocks:,}", f"{c.bytes_per_block:.1f}", f"{c.blocks * c.bytes_per_block / 1e6:,.1f}", *times)
    return made


def _show(progress: Progress, bar: TaskID, completed: int) -> None:
    progress.update(bar, completed=completed)


def main(
    blocks_max: Annotated[int, typer.Option(min=SIZES[1], help="The largest size")] = SIZES[-1],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Fills directories of up to ten million blocks; some minutes, and 1 GiB of memory."""
    sizes = [blocks for blocks in SIZES if blocks <= blocks_max]
    possible = [blocks for blocks in sizes if blocks in SIZES[:2] or fits(blocks)]
    compared = min(BUCKETS_SIZE, possible[-1])
    total = sum(HOLDERS * -(-blocks // NAMES_MAX) + min(LOOK_UPS, -(-blocks // NAMES_MAX)) for blocks in possible)
    total += len(OTHER_DIGITS) * -(-compared // NAMES_MAX)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with EmbeddedRedis() as server, Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("calls", total=total)
        with redis.Redis.from_url(server.url, socket_timeout=30) as client:
            results = measure(client, possible, lambda calls_made: progress.advance(bar, calls_made))
            compare_buckets(client, compared, results, lambda calls_made: progress.advance(bar, calls_made))
        for blocks in possible:
            bar = progress.add_task(f"index of {blocks:,}", total=blocks)
            results.index.append(measure_index(blocks, told=partial(_show, progress, bar)))
            progress.update(bar, completed=blocks)
    for blocks in sizes[len(possible) :]:
        results.memory += extrapolate(results.memory, blocks)
    if as_json:
        typer.echo(json.dumps(asdict(results), indent=2))
    else:
        wide_console().print(memory_table(results.memory), speed_table(results.speed), index_table(results.index))


if __name__ == "__main__":
    typer.run(main)
