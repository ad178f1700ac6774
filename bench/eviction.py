"""Which blocks to keep, tried on a trace: `python -m bench.eviction TRACE [--json]`.

The share of all blocks of all prompts that a prefix cache of a certain size would have found (a block counts only if
all before it are found), for Baton's policy, LRU, LFU, and Belady's optimum, which knows the future. Sizes are shares
of the trace's different blocks. Requests come one after the other, at the trace's times; nothing is random but which
leaves our policy is asked about, drawn by a seed. Of the two kinds of LFU (counting only while a block is cached, or
for ever) the one that finds more is shown, at each size.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from baton.errors import InvalidRequest
from baton.ids import BlockHash
from bench.eviction_baselines import belady_hits, lfu_hits, lru_hits
from bench.prefix_cache import PrefixCache
from kvcache.eviction.policy import make_policy
from simulator.trace import TraceRequest, prompt_block_name, read_trace

CACHE_SHARES = (0.01, 0.05, 0.10, 0.30)
SEED = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts as the names of their blocks, in order of arrival."""

    arrivals_s: Sequence[float]
    prompts: Sequence[Sequence[BlockHash]]

    @property
    def blocks(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def different_blocks(self) -> int:
        return len({name for names in self.prompts for name in names})


@dataclass(frozen=True, slots=True)
class Result:
    cache_share: float
    policy: str
    hit_rate: float


def load_of(requests: Sequence[TraceRequest]) -> Load:
    name = cache(prompt_block_name)
    return Load([request.arrival_s for request in requests], [[*map(name, r.block_ids)] for r in requests])


def our_hits(load: Load, blocks_max: int, seed: int = SEED) -> int:
    longest = max(map(len, load.prompts))
    kept = PrefixCache(blocks_max, longest, make_policy(blocks_max), np.random.default_rng(seed))
    return sum(kept.request(names, now_s) for now_s, names in zip(load.arrivals_s, load.prompts, strict=True))


POLICIES: dict[str, Callable[[Load, int], int]] = {
    "baton": our_hits,
    "lru": lambda load, blocks_max: lru_hits(load.prompts, blocks_max),
    "lfu": lambda load, blocks_max: max(lfu_hits(load.prompts, blocks_max, remembers) for remembers in (False, True)),
    "belady": lambda load, blocks_max: belady_hits(load.prompts, blocks_max),
}


def results(load: Load, shares: Sequence[float] = CACHE_SHARES) -> Iterator[Result]:
    """Policy by policy at one size after the other."""
    blocks, different = load.blocks, load.different_blocks
    for share in shares:
        for policy, hits in POLICIES.items():
            yield Result(share, policy, hits(load, max(1, round(share * different))) / blocks)


def table_of(found: Sequence[Result]) -> Table:
    table = Table("cache", *POLICIES, title="Share of the prompts' blocks found")
    for share in dict.fromkeys(result.cache_share for result in found):
        rates = {result.policy: result.hit_rate for result in found if result.cache_share == share}
        table.add_row(f"{share:.0%}", *(f"{rates[policy]:.2%}" for policy in POLICIES))
    return table


def main(
    trace: Annotated[Path, typer.Argument(help="JSON lines in Mooncake's format.")],
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    try:
        load = load_of(read_trace(trace))
    except InvalidRequest as error:
        raise typer.BadParameter(str(error)) from None
    with Progress(console=Console(stderr=True)) as progress:
        steps = progress.add_task("Replaying", total=len(CACHE_SHARES) * len(POLICIES))
        found = []
        for result in results(load):
            found.append(result)
            progress.update(steps, advance=1, description=f"{result.cache_share:.0%} {result.policy}")
    if is_json:
        print(json.dumps([asdict(result) for result in found]))
    else:
        Console().print(table_of(found))


if __name__ == "__main__":
    typer.run(main)
