"""The workers of one model that can hand each other KV, as columns of numbers that a placement is priced by."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from baton.cluster.worker_info import WorkerInfo
from baton.ids import WorkerId
from router.admission.expected_tokens import UNKNOWN_TOKENS
from router.index.prefixes import Numbers, Prefixes, PrefixLength
from router.placement.block_names import BlockKind
from router.placement.demand import Demand
from router.placement.worker_load import PlacedSequence, WorkerLoad

Floats = NDArray[np.float64]

POOL_RESERVE_DIVISOR = 64
"""Workers keep one block in so many free at admission, for the sequences that run to grow into."""


class Fleet:
    """Prefill workers first, then decode workers, each in one column of every array; seconds, tokens and blocks.

    The arrays change in place, a column at a time, by the `refresh` methods; the fleet itself is made anew when
    workers join or leave. Whoever prices a placement only reads.
    """

    def __init__(self, loads: Sequence[WorkerLoad], demand: Demand, now_s: float) -> None:
        self.demand = demand
        self.kinds = tuple(dict.fromkeys(BlockKind.of(load.info) for load in loads))
        """More than one where workers differ in the size of their blocks: in nothing else can they within a fleet."""
        prefill = [load for load in loads if load.info.role == "prefill"]
        decode = [load for load in loads if load.info.role == "decode"]
        self.loads, self.prefill_count, self.decode_count = (*prefill, *decode), len(prefill), len(decode)
        self.workers: list[WorkerInfo] = [load.info for load in self.loads]
        self.column_of: dict[WorkerId, int] = {load.info.worker_id: i for i, load in enumerate(self.loads)}
        self._column_of_slot = np.full(1, len(self.loads))
        """One that no worker has where the prefix index knows a worker that is not of this fleet; its last entry
        stands for all the slots beyond it."""
        self.links = [(0.0, 0.0)] * len(decode)
        """Of the decode workers: equal where their costs of a transfer are."""
        self.block_tokens = np.array([float(info.block_tokens) for info in self.workers])
        self.token_bytes = max((info.kv_block_bytes / info.block_tokens for info in self.workers), default=0.0)
        self.layers = max((info.layers for info in self.workers), default=1)
        count = len(self.loads)
        self.is_fetching = np.array([info.fetches for info in self.workers], bool)
        self.fetching_count = int(self.is_fetching.sum())
        # What a prompt costs wherever it is computed.
        self.token_s, self.half_context_s, self.chunk_s, self.chunk_tokens = _columns(4, count)
        self.queue_ends_at_s, self.queue_least_s, self.waiting_tokens, self.waiting_prompts = _columns(4, count)
        self.coming, self.coming_until_s = _columns(2, count)
        self.coming_until_latest_s = now_s
        self.pool_count = len(prefill) or len(decode)
        """Of the workers that prompts are sent to as a rule; they come first."""
        self.reported_arrivals_per_s, self.mean_arrivals_per_s = np.zeros(self.pool_count), 0.0
        self.free_blocks, self.block_value_s, self.capacity_tokens = _columns(3, count)
        self.link_latency_s, self.link_byte_s, self.link_block_s = _columns(3, count)
        self.token_least_s = 0.0
        """Of the quickest of the pool, at computing."""
        # What a sequence costs where it decodes; these columns start at the first decode worker.
        self.step_s, self.sequence_s, self.kv_token_s = _columns(3, len(decode))
        self.running, self.remaining_tokens, self.kv_tokens, self.used_blocks = _columns(4, len(decode))
        self.join_s, self.room_blocks, self.room_block_s = _columns(3, len(decode))
        self.capacity_tokens_least = min(map(_capacity_tokens, self.workers), default=0)
        for column, load in enumerate(self.loads):
            load.column = column
            if load.slot is not None:
                self._put_slot(load.slot, column)
            self.refresh(load)

    def queue_s(self, now_s: float) -> float:
        """How long a prompt waits at the least busy pair; infinite without a decode worker. Prefill workers are
        counted on where there are any: that decode workers can do without them is no reason to let more in."""
        if not self.decode_count:
            return np.inf
        queue_s = np.maximum(self.queue_ends_at_s - now_s, self.queue_least_s)
        room_s = np.maximum(1.0 - self.room_blocks, 0.0) * self.room_block_s
        return float(queue_s[: self.pool_count].min() + (self.join_s + room_s).min())

    def too_small_for(self, tokens: int) -> list[WorkerId]:
        """Workers that could never hold a prompt of so many tokens."""
        if tokens <= self.capacity_tokens_least:
            return []
        return [self.workers[column].worker_id for column in np.flatnonzero(self.capacity_tokens < tokens)]

    def arrivals_per_s(self, now_s: float) -> float:
        """Prompts to compute that come to one worker, on average: the greater of what this router sends and what the
        workers saw of all routers."""
        mine = self.demand.pooled_per_s(now_s) / self.pool_count
        return max(mine, self.mean_arrivals_per_s)

    def set_slot(self, load: WorkerLoad, slot: int | None) -> None:
        """Where the prefix index keeps the worker; None: nowhere yet."""
        if load.slot is not None and self._column_of_slot.take(load.slot, mode="clip") == load.column:
            self._put_slot(load.slot, len(self.loads))
        load.slot = slot
        if slot is not None:
            self._put_slot(slot, load.column)

    def _put_slot(self, slot: int, column: int) -> None:
        if (more := slot + 2 - len(self._column_of_slot)) > 0:
            self._column_of_slot = np.append(self._column_of_slot, [len(self.loads)] * more)
        self._column_of_slot[slot] = column

    def prefixes(self, holders: Sequence[tuple[Numbers, PrefixLength]]) -> Prefixes:
        """By column, what the prefix index knows by slot."""
        numbers = np.full(len(self.loads) + 1, -1)
        if holders:
            sets, lengths = zip(*holders, strict=True)
            columns = self._column_of_slot.take(np.concatenate(sets), mode="clip")
            numbers[columns] = np.repeat(np.arange(len(sets)), list(map(len, sets)))
        else:
            lengths = ()
        return Prefixes(numbers[:-1], lengths)

    def refresh(self, load: WorkerLoad) -> None:
        """The worker's own record is another."""
        info, column = load.info, load.column
        self.workers[column] = info
        cost = info.latency.prefill
        self.token_s[column] = cost.token_s
        self.half_context_s[column] = cost.token_context_s / 2
        self.chunk_s[column] = cost.chunk_s
        self.chunk_tokens[column] = info.chunk_tokens
        self.free_blocks[column] = info.kv_blocks_total - info.load.kv_blocks_used - info.load.kv_blocks_cached
        self.block_value_s[column] = self.demand.reuse_chance * info.block_tokens * self._usual_token_s(load)
        self.capacity_tokens[column] = _capacity_tokens(info)
        self.link_latency_s[column] = info.latency.transfer.latency_s
        self.link_byte_s[column] = 1 / info.latency.transfer.bytes_per_s
        self.link_block_s[column] = info.latency.transfer.time_s(info.kv_block_bytes)
        if column < self.pool_count:
            self.token_least_s = float(self.token_s[: self.pool_count].min())
            self.reported_arrivals_per_s[column] = info.load.arrivals_per_s
            self.mean_arrivals_per_s = float(self.reported_arrivals_per_s.mean())
        self.refresh_queue(load)
        if column >= self.prefill_count:
            self.links[column - self.prefill_count] = (self.link_latency_s.item(column), self.link_byte_s.item(column))
            self.refresh_decode(load)

    def refresh_queue(self, load: WorkerLoad) -> None:
        """The prompts that wait there are others. As time goes on, `queue_ends_at_s` comes nearer, but not what is
        behind the oldest prompt: one that takes longer than predicted says nothing about the next."""
        column, usual_token_s = load.column, self._usual_token_s(load)
        reported_end_s = load.reported_at_s + _reported_s(load)
        peers_s = load.peers.prefill_tokens * usual_token_s
        since_s = max(reported_end_s, load.prefill_since_s if load.unreported else load.peers_at_s)
        self.queue_ends_at_s[column] = since_s + peers_s + load.unreported_s
        self.queue_least_s[column] = load.unreported_s - load.oldest_unreported_s
        self.waiting_tokens[column] = load.waiting_tokens
        self.waiting_prompts[column] = load.waiting_prompts

    def placed(self, sequence: PlacedSequence, cached_tokens: int, admission_s: float, now_s: float) -> None:
        """A sequence of this fleet. Until its decode worker's running step is over its prompt is on its way to where
        it is computed."""
        column, is_pooled = sequence.compute.column, sequence.compute.column < self.pool_count
        self.demand.observe(now_s, sequence.prefill_tokens, cached_tokens, pooled=is_pooled)
        if sequence.compute is sequence.decode or not admission_s:
            return
        if self.coming_until_s[column] < now_s:
            self.coming[column] = 0
        self.coming[column] += 1
        self.coming_until_latest_s = self.coming_until_s[column] = now_s + min(2 * admission_s, sequence.itl_s)

    def refresh_decode(self, load: WorkerLoad) -> None:
        """The sequences there are others.

        `room_block_s` is how long it takes until one more block is free: sequences that have `left` tokens on
        average are taken to end evenly over the next `2 left` steps.
        """
        info, column = load.info, load.column - self.prefill_count
        cost = info.latency.decode
        running, kv_tokens, used_blocks = load.running, load.running_kv_tokens, load.used_blocks
        step_s = cost.step_time_s(running, kv_tokens)
        left = load.remaining_tokens_each(unknown=UNKNOWN_TOKENS / 2)
        all_end_s = load.stay_s / load.sequences if load.sequences else 2 * left * step_s
        ends_needed = max(running + 1 - info.sequences_max, 0)
        self.step_s[column] = step_s
        self.sequence_s[column] = cost.sequence_s
        self.kv_token_s[column] = cost.kv_token_s
        self.running[column] = running
        self.remaining_tokens[column] = left
        self.kv_tokens[column] = kv_tokens
        self.used_blocks[column] = used_blocks
        self.join_s[column] = (step_s / 2 if running else 0.0) + all_end_s * min(ends_needed / (running + 1), 1.0)
        self.room_blocks[column] = info.kv_blocks_total * (1 - 1 / POOL_RESERVE_DIVISOR) - used_blocks
        self.room_block_s[column] = all_end_s / max(min(used_blocks, info.kv_blocks_total), 1)

    def _usual_token_s(self, load: WorkerLoad) -> float:
        """One prompt token of others, of which only the number is known."""
        cost = load.info.latency.prefill
        return cost.token_s + cost.chunk_s / load.info.chunk_tokens + cost.token_context_s * self.demand.mean_context


def _reported_s(load: WorkerLoad) -> float:
    """What the prompts that the worker reported take from then on. It counts the step that runs in full until that is
    over: so half of it is done already, on average."""
    waiting, cost = load.info.load, load.info.latency.prefill
    tokens = waiting.waiting_tokens
    if not tokens:
        return 0.0
    chunks = tokens / load.info.chunk_tokens
    all_s = cost.chunk_s * chunks + cost.token_s * tokens + cost.token_context_s * waiting.waiting_token_context
    return all_s * (1 - min(1.0, 1 / chunks) / 2)


def _columns(rows: int, count: int) -> list[Floats]:
    return list(np.zeros((rows, count)))


def _capacity_tokens(worker: WorkerInfo) -> int:
    """Of the longest prompt that leaves room for a token."""
    return min(worker.kv_blocks_total * worker.block_tokens, worker.context_length) - 1
