"""Places requests on workers: keeps what is known of their load, prices every placement, and says which it shall be.

Synchronous, on one thread: workers, their caches, the clock and chance are given.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import inf
from operator import itemgetter
from random import Random
from typing import Protocol

import numpy as np

from baton.clock import Clock
from baton.cluster.router_info import PlacedLoad
from baton.cluster.worker_info import WorkerInfo
from baton.errors import Unavailable
from baton.ids import BlockHash, WorkerId
from baton.settings import Policy as PolicyName
from router.index.prefixes import Numbers, PrefixLength
from router.placement.block_names import BlockKind, Family
from router.placement.candidates import Candidates, candidate, prefill_fallbacks
from router.placement.decision import Decision, Excluded
from router.placement.demand import Demand
from router.placement.fleet import Fleet
from router.placement.policies import make_policy
from router.placement.price import ROW_MAX, Costs, Pair, PlacementRequest, cheapest_pairs, price
from router.placement.worker_load import NO_LOAD, PlacedSequence, WorkerLoad

CANDIDATES_MAX = ROW_MAX
PREFILL_FALLBACKS_MAX = 2
TIE_S = 1e-5
"""Prices that differ by less are taken for equal."""
_TIES = 1024
_NOBODY_EXCLUDED: Mapping[WorkerId, str] = {}
_TOO_LONG = "the prompt is longer than it can hold"
_NO_PARTNER = "no decode worker has the same weights and type of KV"


class PrefixIndex(Protocol):
    """Who holds which blocks."""

    def join(self, worker_id: WorkerId, epoch: str) -> int: ...

    def slot_of(self, worker_id: WorkerId) -> int | None: ...

    def holders(self, names: Sequence[BlockHash]) -> Sequence[tuple[Numbers, PrefixLength]]:
        """Sets of slots, of those who hold the first block, each with how long a prefix they hold."""
        ...

    def expect(self, worker_ids: Sequence[WorkerId], names: Sequence[BlockHash]) -> None: ...


class Placer:
    def __init__(self, index: PrefixIndex, policy: PolicyName, clock: Clock, random: Random) -> None:
        self._index, self._clock, self._random = index, clock, random
        self._policy_name, self._policy = policy, make_policy(policy, random)
        self._loads: dict[WorkerId, WorkerLoad] = {}
        """Of the workers there are, and of those that went while something of ours was on them."""
        self._fleets: dict[str, tuple[Fleet, ...]] = {}
        """By model."""
        self._fleet_of: dict[WorkerLoad, Fleet] = {}
        """Of the workers there are."""
        self._demand: dict[Family, Demand] = {}
        self._peers: Mapping[WorkerId, PlacedLoad] = {}
        self._sequences: dict[Hashable, PlacedSequence] = {}
        self._ties_s = np.zeros(0)
        """Random, and longer by `_TIES` than any fleet is wide."""

    # ---- what is known of the workers

    def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        """All that can be used now, of all models. Cheap where only their loads changed."""
        now_s = self._clock()
        members = {worker.worker_id: worker for worker in workers}
        new = [worker for worker in workers if self._is_new(worker)]
        if new or len(members) != len(self._fleet_of):
            for worker in new:
                self._add(worker, now_s)
            self._rebuild([self._loads[worker_id] for worker_id in members], now_s)
        for load, fleet in self._fleet_of.items():
            worker = members[load.info.worker_id]
            if worker is not load.info:
                load.report(worker, now_s)
                fleet.refresh(load)
            if load.slot != (slot := self._index.slot_of(worker.worker_id)):
                fleet.set_slot(load, slot)

    @property
    def unpaired(self) -> Mapping[WorkerId, str]:
        """Workers that get nothing to do, with the reason: there are decode workers of their model, but none could take
        what they compute."""
        served = [fleets for fleets in self._fleets.values() if any(fleet.decode_count for fleet in fleets)]
        alone = [fleet for fleets in served for fleet in fleets if not fleet.decode_count]
        return {worker.worker_id: _NO_PARTNER for fleet in alone for worker in fleet.workers}

    def _is_new(self, worker: WorkerInfo) -> bool:
        """Also one that started anew, or returns."""
        load = self._loads.get(worker.worker_id)
        return load is None or load not in self._fleet_of or load.info.epoch != worker.epoch

    def _add(self, worker: WorkerInfo, now_s: float) -> None:
        load = self._loads.get(worker.worker_id)
        if load is None or load.info.epoch != worker.epoch:
            load = self._loads[worker.worker_id] = WorkerLoad(worker, now_s)
            load.peers = self._peers.get(worker.worker_id, NO_LOAD)
            self._index.join(worker.worker_id, worker.epoch)

    def _rebuild(self, loads: Collection[WorkerLoad], now_s: float) -> None:
        families: dict[Family, list[WorkerLoad]] = {}
        for load in loads:
            families.setdefault(Family.of(load.info), []).append(load)
        self._demand = {family: self._demand.get(family) or Demand(now_s) for family in families}
        fleets = {family: Fleet(members, self._demand[family], now_s) for family, members in families.items()}
        self._fleet_of = {load: fleet for fleet in fleets.values() for load in fleet.loads}
        self._fleets = {family.model: () for family in families}
        self._ties_s = np.array([self._random.random() * TIE_S for _ in range(_TIES + len(loads))])
        for family, fleet in fleets.items():
            self._fleets[family.model] += (fleet,)
        for load in [load for load in self._loads.values() if load not in self._fleet_of and load.is_idle]:
            del self._loads[load.info.worker_id]

    def set_peers(self, placed: Mapping[str, Mapping[WorkerId, PlacedLoad]]) -> None:
        """What the other routers have placed, by router."""
        now_s, before, self._peers = self._clock(), self._peers, _total(placed.values())
        for worker_id in before.keys() | self._peers.keys():
            load, peers = self._loads.get(worker_id), self._peers.get(worker_id, NO_LOAD)
            if load is not None and load.peers != peers:
                load.peers, load.peers_at_s = peers, now_s
                self._refresh_queue(load)
                self._refresh_decode(load)

    def _refresh_queue(self, load: WorkerLoad) -> None:
        if (fleet := self._fleet_of.get(load)) is not None:
            fleet.refresh_queue(load)

    def _refresh_decode(self, load: WorkerLoad) -> None:
        if load.info.role == "decode" and (fleet := self._fleet_of.get(load)) is not None:
            fleet.refresh_decode(load)

    # ---- a placement

    def place(self, request: PlacementRequest, excluded: Mapping[WorkerId, str] = _NOBODY_EXCLUDED) -> Decision:
        """`excluded`: workers that may not have it, nor be asked for what they have of it, each with the reason.
        Changes nothing.

        Raises Unavailable if no decode worker can take it.
        """
        now_s = self._clock()
        if excluded:
            request = replace(request, not_from=request.not_from.union(excluded))
        fleets = [fleet for fleet in self._fleets.get(request.model, ()) if fleet.decode_count]
        options = [self._price(fleet, request, now_s) for fleet in fleets]
        left_out = self._exclude(request, options, excluded)
        cheapest = _cheapest(options)
        if not cheapest:
            raise Unavailable("No decode worker is ready to serve this model now; try again in a while.")
        chosen = self._policy.choose(options, cheapest)
        others = [pair for pair in cheapest if not pair.is_same(chosen)]
        return Decision(
            self._policy_name,
            candidate(chosen),
            prefill_fallbacks(chosen, PREFILL_FALLBACKS_MAX),
            Candidates(others[: CANDIDATES_MAX - 1]),
            sum(costs.considered for costs in options),
            left_out,
            request.prompt_tokens,
            request.expected_tokens,
        )

    def _price(self, fleet: Fleet, request: PlacementRequest, now_s: float) -> Costs:
        lengths = fleet.prefixes([held for kind in fleet.kinds for held in self._index.holders(request.names(kind))])
        start = int(self._random.random() * _TIES)
        return price(fleet, request, lengths, self._ties_s[start : start + len(fleet.loads)], now_s)

    def _exclude(
        self, request: PlacementRequest, options: Sequence[Costs], excluded: Mapping[WorkerId, str]
    ) -> tuple[Excluded, ...]:
        left_out = [Excluded(worker_id, reason) for worker_id, reason in excluded.items()]
        for costs in options:
            too_long = costs.fleet.too_small_for(request.prompt_tokens)
            left_out += [Excluded(worker_id, _TOO_LONG) for worker_id in too_long if worker_id not in excluded]
            for worker_id in chain(excluded, too_long):
                if (column := costs.fleet.column_of.get(worker_id)) is not None:
                    costs.exclude(column)
        for fleet in self._fleets.get(request.model, ()):
            if not fleet.decode_count:
                left_out += [Excluded(worker.worker_id, _NO_PARTNER) for worker in fleet.workers]
        return tuple(left_out)

    # ---- what becomes of it

    def reserve(self, sequence_id: Hashable, decision: Decision, request: PlacementRequest) -> None:
        """Counts at once, before any worker tells: the load until `finished`, the blocks as if they were there."""
        now_s, chosen = self._clock(), decision.chosen
        block_tokens = chosen.decode.block_tokens
        decode = self._load_of(chosen.decode, now_s)
        compute = decode if chosen.prefill is None else self._load_of(chosen.prefill, now_s)
        cached_tokens = chosen.cached_tokens.total
        sequence = PlacedSequence(
            compute,
            decode,
            request.prompt_tokens - cached_tokens,
            chosen.work_s,
            chosen.itl_s,
            request.prompt_tokens,
            -(-request.prompt_tokens // block_tokens) - chosen.decode_cached_tokens.total // block_tokens,
            request.expected_tokens,
            chosen.terms.ttft_s - chosen.terms.admission_s + chosen.terms.decode_s,
            now_s + chosen.terms.admission_s,
        )
        assert sequence_id not in self._sequences, "an id stands for one sequence at a time"
        self._sequences[sequence_id] = sequence
        compute.add_prefill(sequence_id, sequence, now_s)
        decode.add_sequence(sequence)
        fleet = self._fleet_of.get(decode)
        if fleet is not None and fleet is self._fleet_of.get(compute):
            fleet.placed(sequence, cached_tokens, chosen.terms.admission_s, now_s)
        self._refresh_queue(compute)
        self._refresh_decode(decode)
        for kind in {BlockKind.of(load.info) for load in (decode, compute)}:
            holders = {load.info.worker_id for load in (decode, compute) if BlockKind.of(load.info) == kind}
            self._index.expect(tuple(holders), request.names(kind))

    def first_token(self, sequence_id: Hashable) -> None:
        """Idempotent: the prompt has been computed."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and not sequence.has_token:
            sequence.has_token = True
            sequence.compute.end_prefill(sequence_id, sequence, self._clock())
            self._refresh_queue(sequence.compute)

    def progress(self, sequence_id: Hashable, tokens: int) -> None:
        """So many more have been generated. It shows in prices when the worker's load changes next, and at its next
        heartbeat at the latest."""
        if (sequence := self._sequences.get(sequence_id)) is not None:
            sequence.decode.progress(sequence, tokens)

    def finished(self, sequence_id: Hashable) -> None:
        """Idempotent: whether it ended, failed or was cancelled, nothing of it is left on the workers."""
        self.first_token(sequence_id)
        if (sequence := self._sequences.pop(sequence_id, None)) is not None:
            sequence.decode.end_sequence(sequence)
            self._refresh_decode(sequence.decode)

    def placed(self) -> dict[WorkerId, PlacedLoad]:
        """This router's own load, for its peers; only the workers with any."""
        return {worker_id: load.placed() for worker_id, load in self._loads.items() if not load.is_idle}

    def queue_s(self, model: str) -> float:
        """How long a prompt would wait at the least busy pair before its turn; infinite without a decode worker."""
        now_s = self._clock()
        return min((fleet.queue_s(now_s) for fleet in self._fleets.get(model, ())), default=inf)

    def _load_of(self, worker: WorkerInfo, now_s: float) -> WorkerLoad:
        """One that went since it was chosen counts for nothing any more."""
        return self._loads.get(worker.worker_id) or WorkerLoad(worker, now_s)


def _cheapest(options: Sequence[Costs]) -> Sequence[Pair]:
    if len(options) == 1:
        return cheapest_pairs(options[0], CANDIDATES_MAX)
    pairs = chain.from_iterable(cheapest_pairs(costs, CANDIDATES_MAX) for costs in options)
    return sorted(pairs, key=itemgetter(0))[:CANDIDATES_MAX]


def _total(placed: Collection[Mapping[WorkerId, PlacedLoad]]) -> dict[WorkerId, PlacedLoad]:
    total: dict[WorkerId, PlacedLoad] = {}
    for worker_id, load in chain.from_iterable(one.items() for one in placed):
        total[worker_id] = total[worker_id] + load if worker_id in total else load
    return total
