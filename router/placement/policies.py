"""How a placement is chosen: least added latency, and the customary ways to compare it with.

All of them see the same prices and the same load. The others choose a decode worker and a prefill worker apart,
each by its own score, lowest first; equals are drawn by lot.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Protocol, get_args

import numpy as np

from baton.ids import WorkerId
from baton.settings import Policy as PolicyName
from router.placement.fleet import Floats
from router.placement.price import Costs, Pair, pair_of


class Policy(Protocol):
    def choose(self, options: Sequence[Costs], cheapest: Sequence[Pair]) -> Pair:
        """`options` has one entry for each fleet that can serve the request, `cheapest` the best by price, never
        none."""
        ...


def make_policy(name: PolicyName, random: Random) -> Policy:
    return _POLICIES[name](random)


class LeastAddedLatency:
    """The fewest seconds for the request and for all others."""

    def choose(self, options: Sequence[Costs], cheapest: Sequence[Pair]) -> Pair:
        del options
        return cheapest[0]


class Scored(ABC):
    """A decode worker by its score, then a prefill worker that can send to it; none where there is none."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, options: Sequence[Costs], cheapest: Sequence[Pair]) -> Pair:
        del cheapest
        scores = [np.where(np.isfinite(costs.join_s), self.decode_scores(costs), np.inf) for costs in options]
        least = min(float(score.min()) for score in scores)
        equals = [
            (costs, int(column))
            for costs, score in zip(options, scores, strict=True)
            for column in np.flatnonzero(score == least)
        ]
        costs, column = self._random.choice(equals)
        decode = costs.fleet.prefill_count + column
        pair = pair_of(costs, self._prefill_worker(costs, decode), decode)
        self.chosen(pair)
        return pair

    def _prefill_worker(self, costs: Costs, decode: int) -> int:
        prefill_s = costs.compute_s[: costs.fleet.prefill_count]
        if not np.isfinite(prefill_s).any():
            return decode
        score = np.where(np.isfinite(prefill_s), self.prefill_scores(costs), np.inf)
        return int(self._random.choice(np.flatnonzero(score == score.min())))

    @abstractmethod
    def decode_scores(self, costs: Costs) -> Floats:
        """One for each decode worker of the fleet; the lowest is chosen."""

    @abstractmethod
    def prefill_scores(self, costs: Costs) -> Floats:
        """One for each prefill worker of the fleet."""

    def chosen(self, pair: Pair) -> None:  # noqa: B027 - most have nothing to remember
        """For policies that remember."""


class RandomChoice(Scored):
    def decode_scores(self, costs: Costs) -> Floats:
        return np.zeros(costs.fleet.decode_count)

    def prefill_scores(self, costs: Costs) -> Floats:
        return np.zeros(costs.fleet.prefill_count)


class RoundRobin(Scored):
    """Whoever had its last turn longest ago."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._turn = 0
        self._last_turn: dict[WorkerId, int] = {}

    def decode_scores(self, costs: Costs) -> Floats:
        return self._scores(costs, slice(costs.fleet.prefill_count, None))

    def prefill_scores(self, costs: Costs) -> Floats:
        return self._scores(costs, slice(costs.fleet.prefill_count))

    def _scores(self, costs: Costs, columns: slice) -> Floats:
        return np.array([self._last_turn.get(worker.worker_id, 0) for worker in costs.fleet.workers[columns]], float)

    def chosen(self, pair: Pair) -> None:
        self._turn += 1
        for column in (pair.compute, pair.decode):
            self._last_turn[pair.costs.fleet.workers[column].worker_id] = self._turn


class LeastLoaded(Scored):
    """The fewest prompt tokens to compute before it; the fewest tokens of KV to read with every step."""

    def decode_scores(self, costs: Costs) -> Floats:
        return costs.fleet.kv_tokens

    def prefill_scores(self, costs: Costs) -> Floats:
        return costs.fleet.waiting_tokens[: costs.fleet.prefill_count]


class PrefixAffinity(Scored):
    """The longest cached prefix, whoever of them has the fewest requests; whoever has the fewest of all, where the
    prefix is short or the load uneven.

    The rule and its three thresholds are those of the SGLang router's cache-aware policy (`cache_threshold`,
    `balance_abs_threshold`, `balance_rel_threshold`), for prefill and decode workers alike.
    """

    SHORT = 0.3
    """Of the prompt."""
    UNEVEN_BY = 64
    UNEVEN_TIMES = 1.5

    def decode_scores(self, costs: Costs) -> Floats:
        return self._scores(costs, slice(costs.fleet.prefill_count, None), costs.fleet.running)

    def prefill_scores(self, costs: Costs) -> Floats:
        ends = slice(costs.fleet.prefill_count)
        return self._scores(costs, ends, costs.fleet.waiting_prompts[ends])

    def _scores(self, costs: Costs, columns: slice, requests: Floats) -> Floats:
        cached_tokens = costs.reused.tokens[columns]
        longest = cached_tokens.max()
        uneven = (
            requests.max() - requests.min() > self.UNEVEN_BY and requests.max() > self.UNEVEN_TIMES * requests.min()
        )
        if uneven or longest <= self.SHORT * costs.request.prompt_tokens:
            return requests
        return np.where(cached_tokens == longest, requests, np.inf)


class BlockCost(Scored):
    """NVIDIA Dynamo's published cost, with its default weights: `prefill blocks + decode blocks`, where prefill blocks
    are the active ones and the prompt's, less a credit for each block cached there, not below none.

    As where Dynamo disaggregates: its prefill router counts no decode blocks, its decode router neither prefill
    blocks nor credits. At its default temperature of zero the lowest cost wins.
    """

    CREDITS = (1.0, 0.75, 0.25)
    """For a block in device memory, in host memory and on disk."""

    def decode_scores(self, costs: Costs) -> Floats:
        return costs.fleet.used_blocks

    def prefill_scores(self, costs: Costs) -> Floats:
        fleet = costs.fleet
        tokens = fleet.waiting_tokens[: fleet.prefill_count] + costs.request.prompt_tokens
        blocks: Floats = tokens / fleet.block_tokens[: fleet.prefill_count]
        return np.maximum(blocks - self._credits(costs), 0.0)

    def _credits(self, costs: Costs) -> Floats:
        credit = np.zeros(costs.fleet.prefill_count)
        for column, length in costs.lengths.items():
            if column < len(credit):
                credit[column] = np.dot(self.CREDITS, (length.hbm, length.ddr, length.ssd))
        return credit


_POLICIES: Mapping[PolicyName, Callable[[Random], Policy]] = {
    "least-added-latency": lambda random: LeastAddedLatency(),  # noqa: ARG005 - its equals are told apart by price
    "round-robin": RoundRobin,
    "random": RandomChoice,
    "least-loaded": LeastLoaded,
    "prefix-affinity": PrefixAffinity,
    "block-cost": BlockCost,
}
assert set(_POLICIES) == set(get_args(PolicyName))
