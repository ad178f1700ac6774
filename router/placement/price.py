"""What a placement costs, in seconds, for every worker at once, and which pairs of workers cost least.

Pure: a fleet's numbers and a request come in, prices go out. A prompt is computed on a prefill worker and its KV
sent to a decode worker, or computed on the decode worker itself.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from baton.ids import BlockHash, WorkerId
from router.index.prefixes import Prefixes
from router.placement.block_names import BlockKind
from router.placement.decision import Fetch
from router.placement.fetch import Fetches, find_fetches
from router.placement.fleet import Fleet, Floats
from router.placement.reuse import Reuse, prefill_time_s, reuse

_Priced = tuple[float, int, int, float]
"""A pair's cost, its columns, and the exposed transfer."""
_InRow = tuple[float, int, float]
"""A prefill worker's part of the cost of a pair, its column, and the exposed transfer."""
ROW_MAX = 8
"""Pairs that are looked for at most, so that no more of a decode worker's can be among them."""
OVERTAKEN = 0.5
"""The part of the prompts on their way to a worker that one placed now gets there before."""

LIKELY_TO_COME = 0.25
"""Sequences that will want to decode on a worker while it computes a prompt, beside those that run there: so much
quicker must an idle decode worker be than a prefill worker to be given a prompt. The latency model may be off by as
much (`ERROR_MAX` of its fit), and a prompt that takes longer than predicted stalls streams only where there are any."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    model: str
    prompt_tokens: int
    expected_tokens: float
    """That it will generate; at least one."""
    names: Callable[[BlockKind], Sequence[BlockHash]]
    """Of the prompt's whole blocks."""
    not_from: frozenset[WorkerId] = frozenset()
    """Workers that nothing is to be fetched from."""

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 1 and self.expected_tokens >= 1


@dataclass(slots=True)
class Costs:
    """What one request costs on each worker of a fleet. Terms of computing the prompt have a column for each worker,
    those of decoding one for each decode worker."""

    fleet: Fleet
    request: PlacementRequest
    lengths: Prefixes
    """What the prefix index found, by column."""
    reused: Reuse
    """Of its own."""
    fetches: list[Fetches]
    """From other workers, if the prompt is computed here: each for other columns."""
    cached_tokens: Floats
    """That need not be computed where the prompt is computed."""
    queue_s: Floats
    restore_s: Floats
    """From lower tiers and from other workers."""
    prefill_s: Floats
    work_s: Floats
    """What others wait for, and what can hide a transfer: the prefill, and the restore from its own tiers."""
    others_queue_s: Floats
    others_evicted_s: Floats
    compute_s: Floats
    """The sum of all these; infinite for a worker that is out of the question."""
    admission_s: Floats
    decode_s: Floats
    others_decode_s: Floats
    join_s: Floats
    """The sum of the three; infinite likewise."""
    crowd_s: Floats
    """More steps' time of its own, while prompts are computed on the decode worker that were there before it; if its
    prompt is one of them, it has waited for these already."""
    stall_s: Floats
    """More for the others that decode there, if the prompt is computed on the decode worker."""
    missing_bytes: Floats
    """KV that the decode worker lacks."""

    excluded_prefill: int = 0
    excluded_decode: int = 0
    rows: dict[tuple[float, tuple[float, float]], list[_InRow]] = field(default_factory=dict)
    """By what a decode worker lacks, and its link."""

    def exclude(self, column: int) -> None:
        """No pair with this worker is to be chosen. Idempotent."""
        if np.isinf(self.compute_s[column]):
            return
        self.compute_s[column] = np.inf
        if column < self.fleet.prefill_count:
            self.excluded_prefill += 1
        else:
            self.join_s[column - self.fleet.prefill_count] = np.inf
            self.excluded_decode += 1

    def fetch(self, column: int) -> Fetch | None:
        """What it gets from another worker if the prompt is computed there."""
        for each in self.fetches:
            if each.is_quicker[column]:
                peer, tokens = self.fleet.workers[each.offer.peer], each.offer.tokens
                fetched = tokens - int(self.reused.held_tokens.item(column))
                return Fetch(peer, tokens, fetched, each.fetch_s.item(column), each.saved_s.item(column))
        return None

    def row(self, decode: int) -> list[_InRow]:
        """The best prefill workers for a decode worker by `compute + exposed transfer`, best first. Decode workers
        with the same link that lack as much share a row; it is made after all exclusions."""
        column = decode - self.fleet.prefill_count
        key = (self.missing_bytes.item(column), self.fleet.links[column])
        row = self.rows.get(key)
        if row is None:
            transfer_s = exposed_transfer_s(self, decode)
            cost_s = self.compute_s[: len(transfer_s)] + transfer_s
            best = cost_s.argsort()[:ROW_MAX]
            row = list(zip(cost_s[best].tolist(), best.tolist(), transfer_s[best].tolist(), strict=True))
            self.rows[key] = row
        return row

    @property
    def considered(self) -> int:
        """Pairs, and decode workers that could do everything."""
        fleet = self.fleet
        return (fleet.prefill_count - self.excluded_prefill + 1) * (fleet.decode_count - self.excluded_decode)


class Pair(NamedTuple):
    """Two columns of a fleet; the same twice where the decode worker computes the prompt itself."""

    cost_s: float
    compute: int
    decode: int
    transfer_s: float
    costs: Costs

    def is_same(self, other: "Pair") -> bool:
        return self.compute == other.compute and self.decode == other.decode and self.costs is other.costs


def price(fleet: Fleet, request: PlacementRequest, lengths: Prefixes, ties_s: Floats, now_s: float) -> Costs:
    """`lengths` is what the prefix index found, by column; `ties_s`, one for each worker, is random and far below what
    matters: it decides between equals."""
    tokens, first_decode = request.prompt_tokens, fleet.prefill_count
    reused = reuse(fleet, tokens, lengths)
    prefill_s = prefill_time_s(fleet, tokens, reused.tokens, tokens - reused.tokens)
    closed = {column for worker in request.not_from if (column := fleet.column_of.get(worker)) is not None}
    queue_s = np.maximum(fleet.queue_ends_at_s - now_s, fleet.queue_least_s)
    fetches = find_fetches(fleet, tokens, lengths, reused, queue_s, prefill_s, ties_s, closed)
    cached_tokens, own_restore_s, restore_s, prefill_s = with_fetches(fetches, reused, prefill_s)
    work_s = prefill_s + own_restore_s
    ready_s = prefill_s + restore_s if fetches else work_s
    others_queue_s = delay_to_others_s(fleet, work_s, queue_s, now_s)
    new_blocks = np.ceil(tokens / fleet.block_tokens) - reused.tokens / fleet.block_tokens
    others_evicted_s = eviction_s(fleet, new_blocks)
    lacking_blocks = new_blocks[first_decode:]
    longer_step_s = fleet.sequence_s + fleet.kv_token_s * (tokens + request.expected_tokens / 2)
    admission_s = fleet.join_s + room_s(fleet, lacking_blocks)
    decode_s = request.expected_tokens * (fleet.step_s + longer_step_s)
    others_decode_s = longer_step_s * shared_steps(fleet, request.expected_tokens)
    return Costs(
        fleet,
        request,
        lengths,
        reused,
        fetches,
        cached_tokens,
        queue_s,
        restore_s,
        prefill_s,
        work_s,
        others_queue_s,
        others_evicted_s,
        queue_s + ready_s + others_queue_s + others_evicted_s + ties_s,
        admission_s,
        decode_s,
        others_decode_s,
        admission_s + decode_s + others_decode_s + ties_s[first_decode:],
        crowd_s(fleet, queue_s, ready_s),
        (fleet.running + LIKELY_TO_COME) * prefill_s[first_decode:],
        lacking_blocks * (fleet.block_tokens[first_decode:] * fleet.token_bytes),
    )


# ---- computing the prompt


def with_fetches(fetches: Sequence[Fetches], reused: Reuse, prefill_s: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Tokens that need not be computed, how long they take to come from the worker's own tiers, and from other workers
    too, and how long the rest takes to compute."""
    cached_tokens, own_restore_s, restore_s = reused.tokens, reused.restore_s, reused.restore_s
    for each in fetches:
        takes = each.is_quicker
        cached_tokens = np.where(takes, each.offer.tokens, cached_tokens)
        restore_s = np.where(takes, reused.restore_all_s + each.fetch_s, restore_s)
        prefill_s = np.where(takes, each.prefill_s, prefill_s)
        if reused.restore_all_s is not reused.restore_s:
            own_restore_s = np.where(takes, reused.restore_all_s, own_restore_s)
    return cached_tokens, own_restore_s, restore_s, prefill_s


def delay_to_others_s(fleet: Fleet, work_s: Floats, queue_s: Floats, now_s: float) -> Floats:
    """The longer wait of other prompts to be computed: of those still to come, and of those that are overtaken.

    In a first come, first served queue that lasts for `u` seconds, with `rate` arrivals a second, `work` that is
    added delays the `rate * u` that come behind it: `rate * u * work` is the leading term of the M/G/1 queue's value
    function, `rate * u² / (2 (1 - load))` (Hyytiä, Penttinen and Aalto: Size- and state-aware dispatching problem
    with queue-specific job sizes, EJOR 217, 2012). Here those who come later need not stand behind it: they are sent
    where the queue is shortest. So `u` is the shortest queue. While even that lasts, work that is added anywhere is
    everybody's: all who come to `n` workers, `n * rate * u`, wait `work / n` longer. After that they go elsewhere.

    Who was placed on a worker just now and is still on the way there may come before or after: half of them after.
    """
    pool = slice(fleet.pool_count)
    seconds_each = np.zeros(len(work_s))
    seconds_each[pool] = fleet.arrivals_per_s(now_s) * queue_s[pool].min()
    if fleet.coming_until_latest_s > now_s:
        seconds_each += OVERTAKEN * fleet.coming * (fleet.coming_until_s > now_s)
    return seconds_each * work_s


def eviction_s(fleet: Fleet, new_blocks: Floats) -> Floats:
    """Computing again what the new blocks push out, as likely as cached blocks are asked for again."""
    return np.maximum(new_blocks - fleet.free_blocks, 0.0) * fleet.block_value_s


# ---- decoding


def room_s(fleet: Fleet, new_blocks: Floats) -> Floats:
    """Until enough sequences have ended for the new one's blocks; all of them, at most."""
    wait_s: Floats = np.maximum(new_blocks - fleet.room_blocks, 0.0) * fleet.room_block_s
    return wait_s


def shared_steps(fleet: Fleet, expected_tokens: float) -> Floats:
    """Steps that the sequences running on a decode worker will share with the new one, in sum.

    One with `left` tokens on average has somewhere between none and `2 left`, all alike: the mean of the lesser of
    that and `x` is `x - x² / (4 left)` for `x` up to `2 left`.
    """
    shared = np.minimum(2 * fleet.remaining_tokens, expected_tokens)
    steps: Floats = fleet.running * shared * (1 - shared / (4 * fleet.remaining_tokens))
    return steps


def crowd_s(fleet: Fleet, queue_s: Floats, ready_s: Floats) -> Floats:
    """What is left of the prompts that a decode worker computes itself when a request's first token can come from the
    quickest prefill worker."""
    if not fleet.prefill_count:
        return queue_s
    soonest_s = (queue_s[: fleet.prefill_count] + ready_s[: fleet.prefill_count]).min()
    left_s: Floats = np.maximum(queue_s[fleet.prefill_count :] - soonest_s, 0.0)
    return left_s


# ---- moving KV


def exposed_transfer_s(costs: Costs, decode: int) -> Floats:
    """To the decode worker in this column from every prefill worker: the part that the prefill does not hide.

    Slices leave while the prompt is computed, only those of the last chunk's last layer after it; so the rest is
    hidden as far as the prefill lasts. The slower end of the link sets its pace.
    """
    fleet, first_decode = costs.fleet, costs.fleet.prefill_count
    ends = slice(0, first_decode)
    byte_s = np.maximum(fleet.link_byte_s[ends], fleet.link_byte_s[decode])
    latency_s = np.maximum(fleet.link_latency_s[ends], fleet.link_latency_s[decode])
    missing_bytes = costs.missing_bytes[decode - first_decode]
    last_tokens = np.minimum(costs.request.prompt_tokens - costs.cached_tokens[ends], fleet.chunk_tokens[ends])
    last_bytes = np.minimum(last_tokens * (fleet.token_bytes / fleet.layers), missing_bytes)
    hidden_s = costs.work_s[ends]
    left_s = np.maximum(last_bytes * byte_s, missing_bytes * byte_s - hidden_s)
    exposed_s: Floats = latency_s + left_s
    return exposed_s


def transfer_least_s(costs: Costs) -> Floats:
    """No pair with the decode worker of each column has less of its transfer exposed."""
    fleet, first_decode = costs.fleet, costs.fleet.prefill_count
    left_s = costs.missing_bytes * fleet.link_byte_s[first_decode:] - costs.work_s[:first_decode].max()
    least_s: Floats = fleet.link_latency_s[first_decode:] + np.maximum(left_s, 0.0)
    return least_s


# ---- the search


def cheapest_pairs(costs: Costs, count: int) -> list[Pair]:
    """The `count` cheapest of all, at most ROW_MAX, best first; decode workers that compute the prompt themselves
    among them.

    Branch and bound, exact: decode workers are taken in the order of a lower bound of what a pair with them costs,
    until that bound is above the worst pair kept.
    """
    kept: list[_Priced] = []
    if costs.fleet.prefill_count:
        first_decode, joins_s = costs.fleet.prefill_count, costs.join_s + costs.crowd_s
        least_s = joins_s + transfer_least_s(costs) + costs.compute_s[:first_decode].min()
        order = least_s.argsort()
        bounds = zip(order.tolist(), least_s[order].tolist(), joins_s[order].tolist(), strict=True)
        for column, bound_s, join_s in bounds:
            if bound_s >= _worst_s(kept, count):
                break
            _merge(kept, costs.row(first_decode + column), join_s, first_decode + column, count)
    _merge_alone(kept, costs, count)
    return [Pair(*pair, costs) for pair in kept if pair[0] < np.inf]


def _worst_s(kept: list[_Priced], count: int) -> float:
    """What costs less is still to be kept."""
    return kept[-1][0] if len(kept) >= count else np.inf


def _merge(kept: list[_Priced], row: list[_InRow], join_s: float, decode: int, count: int) -> None:
    """Puts what is good enough of a row, which is in order, in its place among those kept."""
    worst_s = _worst_s(kept, count)
    for cost_s, compute, transfer_s in row:
        if cost_s + join_s >= worst_s:
            return
        insort(kept, (cost_s + join_s, compute, decode, transfer_s))
        del kept[count:]
        worst_s = _worst_s(kept, count)


def _merge_alone(kept: list[_Priced], costs: Costs, count: int) -> None:
    """Likewise the decode workers that do everything."""
    first_decode = costs.fleet.prefill_count
    cost_s = costs.compute_s[first_decode:] + costs.join_s + costs.stall_s
    if cost_s.min() >= _worst_s(kept, count):
        return
    best = cost_s.argsort()[:count]
    for alone_s, column in zip(cost_s[best].tolist(), (best + first_decode).tolist(), strict=True):
        insort(kept, (alone_s, column, column, 0.0))
    del kept[count:]


def pair_of(costs: Costs, compute: int, decode: int) -> Pair:
    """These two, whatever they cost."""
    column = decode - costs.fleet.prefill_count
    if compute == decode:
        cost_s = costs.compute_s[compute] + costs.join_s[column] + costs.stall_s[column]
        return Pair(float(cost_s), compute, decode, 0.0, costs)
    transfer_s = float(exposed_transfer_s(costs, decode)[compute])
    cost_s = costs.compute_s[compute] + costs.join_s[column] + costs.crowd_s[column] + transfer_s
    return Pair(float(cost_s), compute, decode, transfer_s, costs)
