"""Prefixes that one worker has and another gets from it, where that is quicker than computing them. Pure.

What a peer's link is busy with is not known here, so a fetch is priced as on a quiet link; the worker that fetches
gives it up once it has taken as long as computing would have.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.latency import Tier
from baton.latency_fit import ERROR_MAX
from router.index.prefixes import Prefixes, PrefixLength
from router.placement.fleet import Fleet, Floats
from router.placement.reuse import Reuse, own_runs, prefill_time_s, restore_costs

LENGTHS_MAX = 4
"""Of the different lengths of prefix that workers have, the longest ones: who has a shorter one seldom is the better
peer."""
CONFIDENCE = 1 - ERROR_MAX
"""Computing may take so much less than the latency model says, and a fetch must be quicker even then."""


class Offer(NamedTuple):
    """What one worker could hand to the others of its kind: the prompt's first `tokens`, always whole blocks."""

    peer: int
    """Its column."""
    tokens: int
    in_hbm: int
    """So many of them, the first ones, need not be brought up there first; the next `in_ddr` from DDR, others from
    SSD."""
    in_ddr: int


class Fetches(NamedTuple):
    """An offer as each worker of a fleet sees it, by column."""

    offer: Offer
    is_quicker: NDArray[np.bool_]
    """Where it is taken; the other numbers mean nothing elsewhere."""
    fetch_s: Floats
    """To get what the worker itself lacks of it, the peer's own restoring included."""
    prefill_s: Floats
    """To compute the rest of the prompt."""
    saved_s: Floats
    """To compute what is fetched."""


def find_fetches(
    fleet: Fleet,
    tokens: int,
    lengths: Prefixes,
    reused: Reuse,
    queue_s: Floats,
    prefill_s: Floats,
    ties_s: Floats,
    no_peers: Collection[int],
) -> list[Fetches]:
    """One at most for each size of block; none where nothing is gained. `no_peers`: columns that are not
    asked, and get no prompt either."""
    if not fleet.fetching_count or not lengths.lengths or _is_pointless(fleet, reused, queue_s, prefill_s, no_peers):
        return []
    offers = best_offers(fleet, tokens, lengths, ties_s, no_peers)
    found = [_fetches(fleet, tokens, offer, reused, prefill_s) for offer in offers]
    return [fetches for fetches in found if np.count_nonzero(fetches.is_quicker)]


def _is_pointless(fleet: Fleet, reused: Reuse, queue_s: Floats, prefill_s: Floats, no_peers: Collection[int]) -> bool:
    """Whether one of the workers that prompts are sent to has as long a prefix as anybody, and no other could be
    quicker by more than a fetch takes at least, be it that its queue is shorter or that it computes faster."""
    pool = slice(fleet.pool_count)
    queues_s = queue_s[pool]
    best = int((queues_s + prefill_s[pool] + reused.restore_s[pool]).argmin())
    if best in no_peers or reused.held_tokens.item(best) < reused.held_tokens.max():
        return False
    ahead_s = queues_s.item(best) - queues_s.min() + reused.restore_s.item(best)
    faster = 1 - fleet.token_least_s / max(fleet.token_s.item(best), fleet.token_least_s, 1e-12)
    return bool(ahead_s + faster * prefill_s.item(best) <= fleet.link_latency_s.item(best))


# ---- what there is


def best_offers(
    fleet: Fleet, tokens: int, lengths: Prefixes, ties_s: Floats, no_peers: Collection[int]
) -> Sequence[Offer]:
    """For each size of block the offer that would save a worker with nothing of its own most."""
    best: dict[int, tuple[float, Offer]] = {}
    numbers: Sequence[int] = range(len(lengths.lengths))
    if len(numbers) > 1:
        numbers = sorted(numbers, key=lambda number: -_blocks(lengths.lengths[number]))[:LENGTHS_MAX]
    for number in numbers:
        length, holders = lengths.lengths[number], np.flatnonzero(lengths.numbers == number)
        if not len(holders):
            continue
        block_tokens = fleet.workers[holders.item(0)].block_tokens
        most_s = best[block_tokens][0] if block_tokens in best else 0.0
        if most_s and _saved_s(fleet, _blocks(length) * block_tokens) <= most_s:
            continue  # even if it took no time
        peer = _peer(fleet, holders, ties_s, no_peers)
        for offer, cost_s in () if peer is None else _offers(fleet, tokens, peer, length):
            gain_s = _saved_s(fleet, offer.tokens) - cost_s
            if gain_s > most_s:
                best[block_tokens], most_s = (gain_s, offer), gain_s
    return [offer for _, offer in best.values()]


def _saved_s(fleet: Fleet, tokens: int) -> float:
    """To one of those that compute prompts, at least."""
    usual = fleet.workers[0]
    return CONFIDENCE * usual.latency.prefill.prompt_time_s(tokens, 0, usual.chunk_tokens)


def _blocks(length: PrefixLength) -> int:
    return length.hbm + length.ddr + length.ssd


def _peer(fleet: Fleet, holders: NDArray[np.intp], ties_s: Floats, no_peers: Collection[int]) -> int | None:
    """The one with the quickest link; equals take turns."""
    if no_peers:
        holders = holders[~np.isin(holders, list(no_peers))]
    if len(holders) < 2:
        return holders.item(0) if len(holders) else None
    cost_s = fleet.link_block_s[holders] + ties_s[holders]
    return holders.item(cost_s.argmin())


def _offers(fleet: Fleet, tokens: int, peer: int, length: PrefixLength) -> Iterator[tuple[Offer, float]]:
    """What it has in HBM, that and what it has in DDR, and all; each with what handing over all of it takes, but for
    the other end of the link."""
    worker = fleet.workers[peer]
    block_tokens, link = worker.block_tokens, worker.latency.transfer
    if not (length.ddr or length.ssd):  # as a rule, and there is no time to lose
        blocks = min(length.hbm, (tokens - 1) // block_tokens)
        if blocks:
            yield (
                Offer(peer, blocks * block_tokens, blocks * block_tokens, 0),
                link.time_s(blocks * worker.kv_block_bytes),
            )
        return
    costs = restore_costs(worker)
    found: dict[Tier, int] = {"hbm": 0, "ddr": 0}
    for tier, count in own_runs(worker, tokens, length):
        found[tier] = count
        blocks = sum(found.values())
        restore_s = costs.restore_s({tier: count for tier, count in found.items() if tier != "hbm"})
        offer = Offer(peer, blocks * block_tokens, found["hbm"] * block_tokens, found["ddr"] * block_tokens)
        yield offer, restore_s + link.time_s(blocks * worker.kv_block_bytes)


# ---- what it is worth to each


def _fetches(fleet: Fleet, tokens: int, offer: Offer, reused: Reuse, prefill_s: Floats) -> Fetches:
    missing = offer.tokens - reused.held_tokens
    fetch_s = _link_s(fleet, offer.peer, missing)
    if offer.tokens > offer.in_hbm:
        fetch_s += _peer_restore_s(fleet, offer, reused.held_tokens)
    rest_s = prefill_time_s(fleet, tokens, offer.tokens, float(tokens - offer.tokens))
    saved_s = prefill_s - rest_s
    if reused.restore_s is not reused.restore_all_s:
        saved_s += reused.restore_s - reused.restore_all_s
    is_quicker = fleet.is_fetching & (missing > 0) & (fetch_s < CONFIDENCE * saved_s)
    if len(fleet.kinds) > 1:
        is_quicker &= fleet.block_tokens == fleet.block_tokens[offer.peer]
    return Fetches(offer, is_quicker, fetch_s, rest_s, saved_s)


def _link_s(fleet: Fleet, peer: int, missing_tokens: Floats) -> Floats:
    """The slower end of the link sets its pace."""
    worker = fleet.workers[peer]
    token_s = np.maximum(fleet.link_byte_s, fleet.link_byte_s[peer]) * (worker.kv_block_bytes / worker.block_tokens)
    seconds: Floats = np.maximum(fleet.link_latency_s, fleet.link_latency_s[peer]) + missing_tokens * token_s
    return seconds


def _peer_restore_s(fleet: Fleet, offer: Offer, held_tokens: Floats) -> Floats:
    """For the peer to bring up what of the missing tokens lies in its lower tiers."""
    worker = fleet.workers[offer.peer]
    token_bytes = worker.kv_block_bytes / worker.block_tokens
    ddr_end = offer.in_hbm + offer.in_ddr
    seconds = np.zeros(len(fleet.workers))
    spans: tuple[tuple[Tier, int, int], ...] = (("ddr", offer.in_hbm, ddr_end), ("ssd", ddr_end, offer.tokens))
    for tier, begin, end in spans:
        if begin < end:
            cost = worker.latency.restore[tier]
            count = end - np.clip(held_tokens, begin, end)
            seconds += np.where(count > 0, cost.latency_s + count * (token_bytes / cost.bytes_per_s), 0.0)
    return seconds
