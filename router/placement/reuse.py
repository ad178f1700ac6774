"""What a worker need not compute of a prompt, because blocks of it lie in its own tiers. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from baton.cluster.worker_info import WorkerInfo
from kvcache.restore_plan import RestoreCosts, Run, plan_restore
from router.index.prefixes import Prefixes, PrefixLength
from router.placement.fleet import Fleet, Floats


@dataclass(slots=True)
class Reuse:
    """By column. Where nothing lies in lower tiers, the last two are the first two."""

    tokens: Floats
    """That it reuses: as far down as restoring is quicker than computing."""
    restore_s: Floats
    """How long it takes to get these from its lower tiers."""
    held_tokens: Floats
    """That it has at all, in a tier that it can restore from."""
    restore_all_s: Floats


def reuse(fleet: Fleet, tokens: int, lengths: Prefixes) -> Reuse:
    """The last token is always computed: its logits are needed."""
    hbm_blocks = np.array([*(float(length.hbm) for length in lengths.lengths), 0.0])[lengths.numbers]  # -1 is none
    cached_tokens = np.minimum(hbm_blocks, (tokens - 1) // fleet.block_tokens) * fleet.block_tokens
    restore_s = np.zeros(len(fleet.workers))
    found = Reuse(cached_tokens, restore_s, cached_tokens, restore_s)
    if lengths.has_lower_tiers:
        found.held_tokens, found.restore_all_s = cached_tokens.copy(), restore_s.copy()
        for column, length in _in_lower_tiers(lengths):
            worker = fleet.workers[column]
            runs, costs = own_runs(worker, tokens, length), restore_costs(worker)
            plan = plan_restore(runs, tokens, costs)
            cached_tokens[column], restore_s[column] = plan.blocks * worker.block_tokens, plan.restore_s
            found.held_tokens[column] = sum(count for _, count in runs) * worker.block_tokens
            found.restore_all_s[column] = costs.restore_s({tier: count for tier, count in runs if tier != "hbm"})
    return found


def _in_lower_tiers(lengths: Prefixes) -> Iterator[tuple[int, PrefixLength]]:
    """Who has something of it there: few, as a rule, of the many that have the beginning of it in HBM."""
    for number, length in enumerate(lengths.lengths):
        if length.ddr or length.ssd:
            for column in np.flatnonzero(lengths.numbers == number).tolist():
                yield column, length


def own_runs(worker: WorkerInfo, tokens: int, length: PrefixLength) -> list[Run]:
    """What the worker has of the prompt, as far down as it is known how fast it comes back."""
    reusable = (tokens - 1) // worker.block_tokens
    runs: list[Run] = []
    in_tiers: tuple[Run, ...] = (("hbm", length.hbm), ("ddr", length.ddr), ("ssd", length.ssd))
    for tier, count in in_tiers:
        if count and tier != "hbm" and tier not in worker.latency.restore:
            break
        count = min(count, reusable)
        reusable -= count
        if count:
            runs.append((tier, count))
    return runs


def restore_costs(worker: WorkerInfo) -> RestoreCosts:
    return RestoreCosts(worker.latency, worker.block_tokens, worker.kv_block_bytes, worker.chunk_tokens)


def prefill_time_s(fleet: Fleet, tokens: int, cached_tokens: Floats | float, new_tokens: Floats | float) -> Floats:
    """PrefillCost.prompt_time_s for every worker: the new tokens attend to `cached + new / 2` others on average,
    which is half of `cached + tokens`."""
    token_s = fleet.token_s + fleet.half_context_s * (cached_tokens + tokens)
    chunks_s: Floats = fleet.chunk_s * np.ceil(new_tokens / fleet.chunk_tokens)
    return token_s * new_tokens + chunks_s
