"""Priced pairs as those who ask why will see them."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple, overload

from baton.cluster.worker_info import WorkerInfo
from router.index.prefixes import PrefixLength
from router.placement.decision import CachedTokens, Candidate, Fallback, Fetch, Terms
from router.placement.price import Pair


class _Priced(NamedTuple):
    """A pair's own numbers, apart from the arrays they come from: those are the whole fleet's."""

    decode: WorkerInfo
    prefill: WorkerInfo | None
    terms: tuple[float, ...]
    itl_s: float
    reused_tokens: int
    cached: PrefixLength | None
    decode_reused_tokens: int
    decode_cached: PrefixLength | None
    fetch: Fetch | None

    def candidate(self) -> Candidate:
        return Candidate(
            self.decode,
            self.prefill,
            Terms(*self.terms),
            self.itl_s,
            _cached_tokens(self.cached, self.reused_tokens, (self.prefill or self.decode).block_tokens, self.fetch),
            _cached_tokens(self.decode_cached, self.decode_reused_tokens, self.decode.block_tokens),
            self.fetch,
        )


class Candidates(Sequence[Candidate]):
    """Built where somebody looks."""

    __slots__ = ("_priced",)

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._priced = [_priced(pair) for pair in pairs]

    def __len__(self) -> int:
        return len(self._priced)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        if isinstance(index, slice):
            return [priced.candidate() for priced in self._priced[index]]
        return self._priced[index].candidate()


def candidate(pair: Pair) -> Candidate:
    return _priced(pair).candidate()


def _priced(pair: Pair) -> _Priced:
    _, compute, decode, transfer_s, costs = pair
    fleet, joins = costs.fleet, decode - costs.fleet.prefill_count
    is_alone = compute == decode
    others_decode_s, decode_s = costs.others_decode_s.item(joins), costs.decode_s.item(joins)
    if is_alone:
        others_decode_s += costs.stall_s.item(joins)
    else:
        decode_s += costs.crowd_s.item(joins)
    terms = (
        costs.queue_s.item(compute),
        costs.restore_s.item(compute),
        costs.prefill_s.item(compute),
        transfer_s,
        costs.admission_s.item(joins),
        decode_s,
        others_decode_s,
        costs.others_queue_s.item(compute),
        costs.others_evicted_s.item(compute),
    )
    return _Priced(
        fleet.workers[decode],
        None if is_alone else fleet.workers[compute],
        terms,
        decode_s / costs.request.expected_tokens,
        int(costs.cached_tokens.item(compute)),
        costs.lengths.get(compute),
        int(costs.reused.tokens.item(decode)),
        costs.lengths.get(decode),
        costs.fetch(compute),
    )


def _cached_tokens(
    length: PrefixLength | None, reused_tokens: int, block_tokens: int, fetch: Fetch | None = None
) -> CachedTokens:
    """Those that are worth restoring come first: HBM's, then DDR's; what is fetched comes after all of them."""
    fetched = fetch.fetched_tokens if fetch else 0
    if length is None:
        return CachedTokens(peer=fetched)
    own_tokens = reused_tokens - fetched
    hbm = min(length.hbm * block_tokens, own_tokens)
    ddr = min(length.ddr * block_tokens, own_tokens - hbm)
    return CachedTokens(hbm, ddr, own_tokens - hbm - ddr, fetched)


def prefill_fallbacks(pair: Pair, count: int) -> tuple[Fallback, ...]:
    """The best other prefill workers for the decode worker chosen; none where that computes the prompt anyway."""
    if pair.compute == pair.decode:
        return ()
    costs = pair.costs
    others = [compute for cost_s, compute, _ in costs.row(pair.decode) if compute != pair.compute and cost_s < inf]
    return tuple([Fallback(costs.fleet.workers[compute], costs.fetch(compute)) for compute in others[:count]])
