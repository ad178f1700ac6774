"""What a worker need not compute of a prompt, because blocks of it lie in its own tiers. Pure."""

from dataclasses import dataclass

import numpy as np

from baton.cluster.worker_info import WorkerInfo
from baton.latency import Tier
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
        for column, length in lengths.items():
            options = restore_options(fleet.workers[column], tokens, length)
            found.held_tokens[column], found.restore_all_s[column] = options[-1]
            cached_tokens[column], restore_s[column] = cheapest_restore(fleet.workers[column], tokens, options)
    return found


Option = tuple[int, float]
"""Tokens that are reused, and the time it takes to restore them."""


def restore_options(worker: WorkerInfo, tokens: int, length: PrefixLength) -> list[Option]:
    """What lies in HBM, that and what lies in DDR, and all; without tiers that nothing is known to come back from."""
    blocks, restore_s = length.hbm, 0.0
    options = [(blocks, restore_s)]
    below: tuple[tuple[Tier, int], ...] = (("ddr", length.ddr), ("ssd", length.ssd))
    for tier, count in below:
        cost = worker.latency.restore.get(tier)
        if count and cost is None:
            break
        if count and cost is not None:
            blocks, restore_s = blocks + count, restore_s + cost.time_s(count * worker.kv_block_bytes)
            options.append((blocks, restore_s))
    reusable_blocks = (tokens - 1) // worker.block_tokens
    return [(min(blocks, reusable_blocks) * worker.block_tokens, restore_s) for blocks, restore_s in options]


def cheapest_restore(worker: WorkerInfo, tokens: int, options: list[Option]) -> Option:
    """Down to which tier it is quicker to restore than to compute."""

    def time_s(option: Option) -> float:
        cached, restore_s = option
        return restore_s + worker.latency.prefill.prompt_time_s(tokens - cached, cached, worker.chunk_tokens)

    return min(options, key=time_s)


def prefill_time_s(fleet: Fleet, tokens: int, cached_tokens: Floats | float, new_tokens: Floats | float) -> Floats:
    """PrefillCost.prompt_time_s for every worker: the new tokens attend to `cached + new / 2` others on average,
    which is half of `cached + tokens`."""
    token_s = fleet.token_s + fleet.half_context_s * (cached_tokens + tokens)
    chunks_s: Floats = fleet.chunk_s * np.ceil(new_tokens / fleet.chunk_tokens)
    return token_s * new_tokens + chunks_s
