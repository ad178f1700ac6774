"""What fetching a prefix from another worker costs, and where that is quicker than computing it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cluster.worker_info import Load, WorkerInfo
from baton.ids import WorkerId
from baton.latency import DecodeCost, PrefillCost, Tier, TransferCost, WorkerLatency
from router.index.prefixes import Prefixes
from router.placement.candidates import candidate
from router.placement.decision import Fetch
from router.placement.demand import Demand
from router.placement.fetch import CONFIDENCE
from router.placement.fleet import Fleet
from router.placement.price import Costs, cheapest_pairs, pair_of, price
from router.placement.worker_load import WorkerLoad
from tests.router.placement_rig import BLOCK_TOKENS, LATENCY, Rig, a_request, a_worker

NOW_S = 50.0
BUSY = Load(waiting_tokens=50_000)
DECODING = Load(running_sequences=40, kv_tokens=40_000, kv_blocks_used=2500)
QUICK, SLOW = TransferCost(0.001, 1e10), TransferCost(0.001, 1e6)


@dataclass(frozen=True)
class Prefix:
    hbm: int = 0
    ddr: int = 0
    ssd: int = 0

    @property
    def blocks(self) -> int:
        return self.hbm + self.ddr + self.ssd


def a_fetcher(name: str, role: str = "prefill", *, link: TransferCost = QUICK, **fields: object) -> WorkerInfo:
    restore = fields.pop("restore", {})
    latency = WorkerLatency(LATENCY.prefill, LATENCY.decode, link, restore)  # type: ignore[arg-type]
    return a_worker(name, role, **{"latency": latency, "fetches": True, **fields})  # type: ignore[arg-type]


def priced(
    workers: list[WorkerInfo], tokens: int, lengths: Mapping[int, Prefix], not_from: frozenset[WorkerId] = frozenset()
) -> Costs:
    fleet = Fleet([WorkerLoad(worker, NOW_S) for worker in workers], Demand(NOW_S), NOW_S)
    request = a_request(tokens)
    request = type(request)("m", tokens, request.expected_tokens, request.names, not_from)
    return price(fleet, request, Prefixes.of(lengths, len(workers)), np.zeros(len(workers)), NOW_S)


def fetches(costs: Costs) -> list[Fetch | None]:
    return [costs.fetch(column) for column in range(len(costs.fleet.workers))]


def prefill_s(tokens: int, cached: int) -> float:
    return LATENCY.prefill.prompt_time_s(tokens - cached, cached, 512)


# ---- one busy holder, one idle worker


def test_an_idle_worker_fetches_what_a_busy_one_holds() -> None:
    tokens, held = 8000, 400
    workers = [
        a_fetcher("p0", load=BUSY),
        a_fetcher("p1", link=TransferCost(0.002, 5e9)),
        a_fetcher("d", "decode", load=DECODING),
    ]
    costs = priced(workers, tokens, {0: Prefix(hbm=held), 1: Prefix(hbm=40)})
    fetch = costs.fetch(1)
    assert fetch is not None and fetch.worker.worker_id == "p0"
    assert (fetch.tokens, fetch.fetched_tokens) == (held * BLOCK_TOKENS, (held - 40) * BLOCK_TOKENS)
    assert fetch.fetch_s == pytest.approx(0.002 + 360 * BLOCK_TOKENS * 100_000 / 5e9), "the slower end sets the pace"
    assert fetch.compute_s == pytest.approx(prefill_s(tokens, 40 * BLOCK_TOKENS) - prefill_s(tokens, fetch.tokens))
    found = candidate(pair_of(costs, 1, 2))
    assert found.fetch == fetch
    assert (found.cached_tokens.hbm, found.cached_tokens.peer) == (40 * BLOCK_TOKENS, 360 * BLOCK_TOKENS)
    assert found.terms.restore_s == pytest.approx(fetch.fetch_s)
    assert found.terms.prefill_s == pytest.approx(prefill_s(tokens, fetch.tokens))
    assert found.work_s == pytest.approx(found.terms.prefill_s), "it does other things while it fetches"
    assert cheapest_pairs(costs, 1)[0].compute == 1


def test_who_holds_most_fetches_nothing() -> None:
    workers = [a_fetcher("p0", load=BUSY), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 8000, {0: Prefix(hbm=400)})
    assert costs.fetch(0) is None and costs.fetch(1) is not None


@pytest.mark.parametrize("blocks", [1, 499, 500, 10_000])
def test_the_last_token_is_always_computed(blocks: int) -> None:
    workers = [a_fetcher("p0", load=BUSY), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    for fetch in fetches(priced(workers, 8000, {0: Prefix(hbm=blocks)})):
        assert fetch is None or fetch.tokens <= 7999 // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_fetch_must_be_quicker_even_if_computing_takes_less_than_predicted() -> None:
    tokens, held = 8000, 400
    saved_s = prefill_s(tokens, 0) - prefill_s(tokens, held * BLOCK_TOKENS)
    size_bytes = held * BLOCK_TOKENS * 100_000
    for share, is_quicker in ((0.99, True), (1.01, False)):
        link = TransferCost(0.0, size_bytes / (share * CONFIDENCE * saved_s))
        workers = [
            a_fetcher("p0", load=BUSY, link=link),
            a_fetcher("p1", link=link),
            a_fetcher("d", "decode", load=DECODING),
        ]
        fetch = priced(workers, tokens, {0: Prefix(hbm=held)}).fetch(1)
        assert (fetch is not None) is is_quicker


def test_who_does_not_fetch_is_priced_without() -> None:
    workers = [a_fetcher("p0", load=BUSY), a_fetcher("p1", fetches=False), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 8000, {0: Prefix(hbm=400)})
    assert costs.fetch(1) is None and costs.cached_tokens[1] == 0
    assert costs.fetch(2) is not None, "a decode worker that computes the prompt itself fetches like any other"


def test_what_is_fetched_is_not_on_the_decode_worker_of_a_pair() -> None:
    workers = [a_fetcher("p0", load=BUSY), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 8000, {0: Prefix(hbm=400)})
    assert costs.missing_bytes[0] == 8000 * 100_000, "all of the prompt is sent to it"
    assert candidate(pair_of(costs, 1, 2)).decode_cached_tokens.total == 0


def test_a_worker_that_failed_is_not_asked() -> None:
    workers = [
        a_fetcher("p0", load=BUSY),
        a_fetcher("p1", load=BUSY),
        a_fetcher("p2"),
        a_fetcher("d", "decode", load=DECODING),
    ]
    lengths = {0: Prefix(hbm=400), 1: Prefix(hbm=200)}
    for not_from, expected in (((), "p0"), (("p0",), "p1"), (("p0", "p1"), None)):
        fetch = priced(workers, 8000, lengths, frozenset(map(WorkerId, not_from))).fetch(2)
        assert (fetch.worker.worker_id if fetch else None) == expected


def test_blocks_of_another_size_are_not_fetched() -> None:
    workers = [
        a_fetcher("p0", load=BUSY, block_tokens=32),
        a_fetcher("p1"),
        a_fetcher("p2", block_tokens=32),
        a_fetcher("d", "decode", load=DECODING),
    ]
    costs = priced(workers, 8000, {0: Prefix(hbm=200)})
    assert [fetch is not None for fetch in fetches(costs)] == [False, False, True, False]


def test_each_size_of_block_has_its_own_peer() -> None:
    workers = [
        a_fetcher("p0", load=BUSY, block_tokens=32),
        a_fetcher("p1", load=BUSY),
        a_fetcher("p2", block_tokens=32),
        a_fetcher("d", "decode", load=DECODING),
    ]
    costs = priced(workers, 8000, {0: Prefix(hbm=200), 1: Prefix(hbm=100)})
    assert [fetch and fetch.worker.worker_id for fetch in fetches(costs)] == [None, None, "p0", "p1"]


def test_a_free_holder_leaves_nothing_to_gain() -> None:
    workers = [a_fetcher("p0"), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 8000, {0: Prefix(hbm=400)})
    assert costs.fetches == [] and cheapest_pairs(costs, 1)[0].compute == 0


# ---- lower tiers


TIER: Mapping[Tier, TransferCost] = {"ddr": TransferCost(0.003, 2e10), "ssd": TransferCost(0.01, 5e9)}


def test_the_peers_own_restore_is_part_of_a_fetch() -> None:
    workers = [a_fetcher("p0", load=BUSY, restore=TIER), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 16_000, {0: Prefix(hbm=100, ddr=200, ssd=300), 1: Prefix(hbm=150)})
    fetch = costs.fetch(1)
    assert fetch is not None and fetch.tokens == 600 * BLOCK_TOKENS
    block = BLOCK_TOKENS * 100_000
    restore_s = TIER["ddr"].time_s(150 * block) + TIER["ssd"].time_s(300 * block)
    assert fetch.fetch_s == pytest.approx(QUICK.time_s(450 * block) + restore_s), "what is missing, not all"


def test_what_a_peer_is_too_slow_to_bring_up_is_not_fetched() -> None:
    slow: Mapping[Tier, TransferCost] = {"ddr": TIER["ddr"], "ssd": SLOW}
    for restore, blocks in ((TIER, 600), (slow, 300), ({"ssd": QUICK}, 100)):
        workers = [
            a_fetcher("p0", load=BUSY, restore=restore),
            a_fetcher("p1"),
            a_fetcher("d", "decode", load=DECODING),
        ]
        fetch = priced(workers, 16_000, {0: Prefix(hbm=100, ddr=200, ssd=300)}).fetch(1)
        assert fetch is not None and fetch.tokens == blocks * BLOCK_TOKENS


def test_a_fetch_comes_after_all_that_the_worker_has_itself() -> None:
    workers = [a_fetcher("p0", load=BUSY), a_fetcher("p1", restore=TIER), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 16_000, {0: Prefix(hbm=600), 1: Prefix(hbm=50, ddr=100)})
    fetch, block = costs.fetch(1), BLOCK_TOKENS * 100_000
    assert fetch is not None and fetch.fetched_tokens == 450 * BLOCK_TOKENS
    found = candidate(pair_of(costs, 1, 2))
    assert found.terms.restore_s == pytest.approx(TIER["ddr"].time_s(100 * block) + fetch.fetch_s)
    assert (found.cached_tokens.hbm, found.cached_tokens.ddr) == (50 * BLOCK_TOKENS, 100 * BLOCK_TOKENS)
    assert found.work_s == pytest.approx(found.terms.prefill_s + TIER["ddr"].time_s(100 * block))


# ---- any fleet


links = st.builds(TransferCost, st.sampled_from([0.0, 0.001, 0.05]), st.sampled_from([1e9, 1e10, 1e11]))
restores = st.dictionaries(st.sampled_from(["ddr", "ssd"]), links)
latencies = st.builds(
    WorkerLatency,
    st.builds(PrefillCost, st.floats(0, 0.05), st.floats(1e-4, 1e-3), st.floats(0, 1e-7)),
    st.just(DecodeCost(0.01, 1e-4, 1e-7)),
    links,
    restores,
)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[WorkerInfo], int, dict[int, Prefix]]:
    roles = ["prefill"] * draw(st.integers(0, 3)) + ["decode"] * draw(st.integers(1, 3))
    workers = [
        a_worker(
            f"w{number}",
            role,  # type: ignore[arg-type]
            latency=draw(latencies),
            load=draw(st.sampled_from([Load(), BUSY, BUSY])),
            fetches=draw(st.sampled_from([True, True, True, False])),
        )
        for number, role in enumerate(roles)
    ]
    counts = st.integers(0, 60)
    columns = st.integers(0, len(workers) - 1)
    lengths = draw(st.dictionaries(columns, st.builds(Prefix, counts, counts, counts).filter(lambda p: p.blocks > 0)))
    return workers, draw(st.one_of(st.integers(1, 3000), st.integers(1000, 3000))), lengths


def own_options(worker: WorkerInfo, tokens: int, prefix: Prefix) -> list[tuple[int, float]]:
    """Blocks and seconds of each way to use what it has itself, by hand."""
    left = (tokens - 1) // BLOCK_TOKENS
    blocks, seconds = min(prefix.hbm, left), 0.0
    options = [(blocks, seconds)]
    for tier, count in (("ddr", prefix.ddr), ("ssd", prefix.ssd)):
        if count and tier not in worker.latency.restore:
            break
        if count := min(count, left - blocks):
            cost = worker.latency.restore[tier]  # type: ignore[index]
            blocks, seconds = blocks + count, seconds + cost.time_s(count * worker.kv_block_bytes)
            options.append((blocks, seconds))
    return options


def fetch_by_hand(here: WorkerInfo, peer: WorkerInfo, held_blocks: int, until_blocks: int, prefix: Prefix) -> float:
    link, other = here.latency.transfer, peer.latency.transfer
    size_bytes = (until_blocks - held_blocks) * here.kv_block_bytes
    seconds = max(link.latency_s, other.latency_s) + size_bytes / min(link.bytes_per_s, other.bytes_per_s)
    in_tier = ["hbm"] * prefix.hbm + ["ddr"] * prefix.ddr + ["ssd"] * prefix.ssd
    for tier in ("ddr", "ssd"):
        if count := in_tier[held_blocks:until_blocks].count(tier):
            seconds += peer.latency.restore[tier].time_s(count * peer.kv_block_bytes)
    return seconds


@settings(deadline=None, max_examples=300)
@given(fleet=fleets())
def test_every_price_is_what_the_formula_says_of_one_worker(
    fleet: tuple[list[WorkerInfo], int, dict[int, Prefix]],
) -> None:
    workers, tokens, lengths = fleet
    costs = priced(workers, tokens, lengths)
    for column, worker in enumerate(workers):
        options = own_options(worker, tokens, lengths.get(column, Prefix()))

        def prompt_s(blocks: int, worker: WorkerInfo = worker) -> float:
            cached = blocks * BLOCK_TOKENS
            return worker.latency.prefill.prompt_time_s(tokens - cached, cached, worker.chunk_tokens)

        alone_s = min(seconds + prompt_s(blocks) for blocks, seconds in options)
        total_s = costs.restore_s[column] + costs.prefill_s[column]
        fetch = costs.fetch(column)
        if fetch is None:
            assert total_s == pytest.approx(alone_s)
            continue
        held_blocks, restore_s = options[-1]
        peer = next(number for number, other in enumerate(workers) if other is fetch.worker)
        until_blocks = fetch.tokens // BLOCK_TOKENS
        by_hand_s = fetch_by_hand(worker, fetch.worker, held_blocks, until_blocks, lengths[peer])
        assert worker.fetches and peer != column
        assert fetch.tokens % BLOCK_TOKENS == 0 and fetch.tokens < tokens
        assert 0 < fetch.fetched_tokens == fetch.tokens - held_blocks * BLOCK_TOKENS
        assert until_blocks <= lengths[peer].blocks
        assert fetch.fetch_s == pytest.approx(by_hand_s)
        assert fetch.compute_s == pytest.approx(alone_s - restore_s - prompt_s(until_blocks))
        assert fetch.fetch_s < CONFIDENCE * fetch.compute_s
        assert total_s == pytest.approx(restore_s + by_hand_s + prompt_s(until_blocks))
        assert total_s < alone_s


# ---- through the placer


def test_the_books_count_what_is_fetched_as_cached() -> None:
    busy = [a_fetcher("p0", load=BUSY), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    rig = Rig(busy)
    request = a_request(8000)
    rig.hold("p0", request, 400)
    _, decision = rig.place(request)
    assert decision.chosen.prefill is not None and decision.chosen.prefill.worker_id == "p1"
    assert decision.chosen.fetch is not None and decision.chosen.cached_tokens.peer == 400 * BLOCK_TOKENS
    assert rig.placer.placed()[WorkerId("p1")].prefill_tokens == 8000 - 400 * BLOCK_TOKENS
    assert [fallback.worker.worker_id for fallback in decision.prefill_fallbacks] == ["p0"]
    assert decision.prefill_fallbacks[0].fetch is None, "it has it all"


def test_an_excluded_worker_is_not_asked_for_its_blocks() -> None:
    rig = Rig([a_fetcher("p0", load=BUSY), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)])
    request = a_request(8000)
    rig.hold("p0", request, 400)
    assert rig.placer.place(request).chosen.fetch is not None
    assert rig.placer.place(request, {WorkerId("p0"): "it failed"}).chosen.fetch is None


def test_an_excluded_holder_that_is_free_hides_no_other_that_is_busy() -> None:
    workers = [a_fetcher("p0"), a_fetcher("p1", load=BUSY), a_fetcher("p2"), a_fetcher("d", "decode", load=DECODING)]
    lengths = {0: Prefix(hbm=400), 1: Prefix(hbm=400)}
    assert priced(workers, 8000, lengths).fetch(2) is None
    fetch = priced(workers, 8000, lengths, frozenset([WorkerId("p0")])).fetch(2)
    assert fetch is not None and fetch.worker.worker_id == "p1"


def test_fallbacks_have_plans_of_their_own() -> None:
    rig = Rig(
        [
            *(a_fetcher(f"p{number}", load=BUSY if number == 0 else None) for number in range(3)),
            a_fetcher("d", "decode", load=DECODING),
        ]
    )
    request = a_request(8000)
    rig.hold("p0", request, 400)
    rig.hold("p2", request, 10)
    decision = rig.placer.place(request)
    plans = {decision.chosen.prefill.worker_id: decision.chosen.fetch} if decision.chosen.prefill else {}
    plans |= {fallback.worker.worker_id: fallback.fetch for fallback in decision.prefill_fallbacks}
    fetched = {name: fetch.fetched_tokens // BLOCK_TOKENS if fetch else 0 for name, fetch in plans.items()}
    assert fetched == {"p0": 0, "p1": 400, "p2": 390}


def test_chunks_are_counted_for_what_is_left() -> None:
    workers = [a_fetcher("p0", load=BUSY), a_fetcher("p1"), a_fetcher("d", "decode", load=DECODING)]
    costs = priced(workers, 8000, {0: Prefix(hbm=400)})
    left = 8000 - 400 * BLOCK_TOKENS
    context_s = LATENCY.prefill.token_context_s * left * (400 * BLOCK_TOKENS + left / 2)
    assert costs.prefill_s[1] == pytest.approx(ceil(left / 512) * 0.005 + left * 5e-5 + context_s)
