"""What is fetched before a request is queued, how long it waits for that at most, and what becomes of the blocks."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.clock import monotonic
from baton.errors import DeadlineExceeded, Overloaded, TransferError
from baton.ids import BlockHash, BlockId, RequestId, WorkerId
from baton.rpc import common_pb2
from engine.interface import Reserved, Retention
from engine.worker import patience, prefetch
from engine.worker.patience import FETCH_SHARE
from engine.worker.prefetch import NOTHING, PIN_S, Prefetched, Prefetcher
from engine.worker.prefetch_metrics import PrefetchMetrics
from kvcache.block_hash import block_hashes, root_hash
from kvtransfer.fetch.client import FetchCancelled, Fetched, NoLink
from kvtransfer.landing import Landing

A = RequestId("a")
ME, PEER = WorkerId("decode-0"), WorkerId("decode-1")
BLOCK_TOKENS = 8
MODEL = SimpleNamespace(fingerprint="f", layout=SimpleNamespace(block_tokens=BLOCK_TOKENS, dtype="float32"))
PROMPT = tuple(range(40))
ROOT = root_hash("f", BLOCK_TOKENS, "float32", cache_salt="salt")
NAMES = tuple(block_hashes(ROOT, PROMPT[:32], BLOCK_TOKENS)[1:])
"""Of the prompt's second to fourth block."""
BLOCKS = tuple(map(BlockId, (7, 8, 9)))
RESERVED = Reserved((BlockId(1),), NAMES, BLOCKS)
MINE = Retention("t", ttl_s=5.0)
PLAN = common_pb2.FetchPlan(
    worker_id=PEER, address="peer:1", blocks=4, block_tokens=BLOCK_TOKENS, fetch_s=0.001, compute_s=10.0
)
SOON_S = 5.0


class FakeEngine:
    """On a thread of its own that is none."""

    def __init__(self) -> None:
        self.model = MODEL
        self.reserved = RESERVED
        self.asked: list[tuple[Sequence[int], str, int]] = []
        self.adopted: list[tuple[Reserved, tuple[int, ...], Retention]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.refusal: Overloaded | None = None

    def reserve(self, prompt: Sequence[int], cache_salt: str, blocks_max: int) -> Reserved:
        self.asked.append((prompt, cache_salt, blocks_max))
        return self.reserved

    def adopt(self, reserved: Reserved, digests: Sequence[int], owner: Retention) -> None:
        self.adopted.append((reserved, tuple(digests), owner))

    async def call(self, command: Callable[[Any], Any]) -> Any:
        if self.refusal:
            raise self.refusal
        outcome = command(self)
        await self.may_answer.wait()
        return outcome

    def post(self, command: Callable[[Any], Any]) -> None:
        command(self)


class FakeFetcher:
    """Answers `fetched` when it may; like the real one, before its deadline and the caller's word."""

    def __init__(self) -> None:
        self.fetched = Fetched((11, 12, 13), None, 3000, 0.5)
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.hears = True
        self.lands = 0
        """Blocks, at once; the others when it may end."""
        self.is_asked, self.has_ended = asyncio.Event(), asyncio.Event()
        self.asked: list[tuple[Any, ...]] = []
        self.linked, self.begun = {"peer:1"}, list[str]()

    def is_linked(self, address: str) -> bool:
        return address in self.linked

    def begin_link(self, address: str) -> None:
        self.begun.append(address)

    async def fetch(
        self,
        address: str,
        request_id: RequestId,
        names: Sequence[BlockHash],
        blocks: Sequence[BlockId],
        deadline_s: float,
        cancelled: asyncio.Event,
        landing: Landing,
    ) -> Fetched:
        self.asked.append((address, request_id, names, blocks, deadline_s))
        land(landing, names, self.lands)
        self.is_asked.set()
        ends = [asyncio.ensure_future(self.may_end.wait())]
        if self.hears:
            ends.append(asyncio.ensure_future(cancelled.wait()))
        done, late = await asyncio.wait(
            ends, timeout=deadline_s if self.hears else None, return_when=asyncio.FIRST_COMPLETED
        )
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self.has_ended.set()
        if self.may_end.is_set():
            return self.fetched
        return Fetched((11,), FetchCancelled("") if done else DeadlineExceeded(""), 0, 0.0)


def land(landing: Landing, names: Sequence[BlockHash], blocks: int) -> None:
    landing.started(len(names))
    landing.verified(landing.landed(0, range(blocks)), [])


@dataclass
class Rig:
    engine: FakeEngine = field(default_factory=FakeEngine)
    fetcher: FakeFetcher = field(default_factory=FakeFetcher)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    transferred: list[tuple[int, float]] = field(default_factory=list)
    pinned: list[tuple[Any, ...]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    prompt_s: float = 100.0
    pin_error: Exception | None = None
    is_on: bool = True

    def __post_init__(self) -> None:
        self.prefetcher = Prefetcher(
            *(ME, self.engine, self.fetcher, self, PrefetchMetrics(self.registry)),  # type: ignore[arg-type]
            lambda size, seconds: self.transferred.append((size, seconds)),
            self._pin,
            is_on=self.is_on,
        )

    async def _pin(self, *asked: Any) -> None:
        self.pinned.append(asked)
        if self.pin_error:
            raise self.pin_error

    def compute_s(self, new: int, cached: int) -> float:
        assert new in (8, 16, 24) and (new + cached == 32 or (new, cached) == (8, 8))
        return self.prompt_s * new / 24

    async def prefetch(self, **changes: Any) -> Prefetched:
        plan = common_pb2.FetchPlan()
        plan.CopyFrom(PLAN)
        for name, value in changes.items():
            setattr(plan, name, value)
        return await self.prefetcher.prefetch(A, plan, PROMPT, "salt", MINE, self.cancelled)

    def outcomes(self) -> dict[str, float]:
        return {
            sample.labels["outcome"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "baton_kv_fetches_total"
        }


def run(test: Callable[[Rig], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            rig = Rig(**options)
            await test(rig)
            rig.fetcher.may_end.set()
            await rig.prefetcher.close()

    asyncio.run(main())


# ---- what comes


def test_what_the_peer_has_is_fetched_and_adopted_before_the_request_goes_on() -> None:
    async def test(rig: Rig) -> None:
        prefetched = await rig.prefetch()
        assert prefetched.tokens == rig.prefetcher.fetched_tokens == 24
        assert 0 <= prefetched.seconds < SOON_S
        assert rig.engine.asked == [(PROMPT, "salt", 4)]
        assert rig.engine.adopted == [(RESERVED, (11, 12, 13), MINE)]
        assert rig.fetcher.asked == [("peer:1", A, NAMES, BLOCKS, FETCH_SHARE * 10.0)]
        assert rig.pinned == [(NAMES, PEER, PIN_S)]
        assert rig.transferred == [(3000, 0.5)]
        assert rig.outcomes() == {"complete": 1}
        assert rig.registry.get_sample_value("baton_kv_fetched_tokens_total") == 24
        assert rig.registry.get_sample_value("baton_kv_fetched_bytes_total") == 3000

    run(test)


@pytest.mark.parametrize(
    ("fetched", "outcome"),
    [
        (Fetched((11, 12), None), "partial"),
        (Fetched((), None), "missed"),
        (Fetched((11,), TransferError("broken")), "failed"),
        (Fetched((), NoLink("it broke just now")), "no_link"),
    ],
)
def test_what_came_counts_whatever_ended_it(fetched: Fetched, outcome: str) -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.fetched = fetched
        assert (await rig.prefetch()).tokens == 8 * fetched.blocks
        assert rig.engine.adopted == [(RESERVED, fetched.digests, MINE)]
        assert rig.outcomes() == {outcome: 1}

    run(test)


def test_a_directory_that_fails_is_no_reason_not_to_fetch() -> None:
    async def test(rig: Rig) -> None:
        assert (await rig.prefetch()).tokens == 24

    run(test, pin_error=ConnectionError("away"))


# ---- what is not even tried


@pytest.mark.parametrize(
    "changes",
    [
        {"address": ""},
        {"blocks": 0},
        {"compute_s": 0.0},
        {"worker_id": ME},
        {"block_tokens": 16},
    ],
)
def test_plans_that_make_no_sense_here_are_ignored(changes: dict[str, Any]) -> None:
    async def test(rig: Rig) -> None:
        assert await rig.prefetch(**changes) == NOTHING
        assert not rig.engine.asked and not rig.fetcher.asked

    run(test)


def test_it_can_be_turned_off() -> None:
    async def test(rig: Rig) -> None:
        assert await rig.prefetch() == NOTHING
        assert not rig.engine.asked

    run(test, is_on=False)


def test_where_nothing_is_lacking_the_blocks_are_given_back() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.reserved = nothing = Reserved((BlockId(1), BlockId(2)), (), ())
        assert await rig.prefetch() == NOTHING
        assert rig.engine.adopted == [(nothing, (), MINE)] and not rig.fetcher.asked

    run(test)


def test_where_this_worker_computes_quicker_than_the_fetch_is_expected_to_be_it_computes() -> None:
    async def test(rig: Rig) -> None:
        assert await rig.prefetch(fetch_s=0.5) == NOTHING
        assert rig.engine.adopted == [(RESERVED, (), MINE)] and not rig.fetcher.asked

    run(test, prompt_s=0.4)


def test_an_engine_that_has_too_much_to_do_is_not_waited_for() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.refusal = Overloaded("busy")
        assert await rig.prefetch() == NOTHING

    run(test)


def test_nobody_waits_for_a_link_the_next_one_finds_it() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.linked.clear()
        assert await rig.prefetch() == NOTHING
        assert rig.fetcher.begun == ["peer:1"]
        assert not rig.engine.asked and not rig.fetcher.asked and not rig.pinned
        assert rig.outcomes() == {"no_link": 1}
        rig.fetcher.linked.add("peer:1")
        assert (await rig.prefetch()).tokens == 24

    run(test)


def test_fetches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PREFETCHES_MAX", 1)

    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        first = asyncio.create_task(rig.prefetch())
        await rig.fetcher.is_asked.wait()
        assert await rig.prefetch() == NOTHING
        rig.fetcher.may_end.set()
        assert (await first).tokens == 24
        assert (await rig.prefetch()).tokens == 24

    run(test)


# ---- several requests for the same


@pytest.mark.parametrize("begin", ["one after the other", "at once"])
def test_requests_that_lack_the_same_share_one_fetch(begin: str) -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        first = asyncio.create_task(rig.prefetch())
        if begin == "one after the other":
            await rig.fetcher.is_asked.wait()
        second = asyncio.create_task(rig.prefetch())
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(rig.fetcher.asked) == 1 and not first.done() and not second.done()
        rig.engine.reserved = Reserved(BLOCKS, (), ())  # when it looks again
        rig.fetcher.may_end.set()
        assert [(await prefetching).tokens for prefetching in (first, second)] == [24, 24]
        assert len(rig.fetcher.asked) == 1 and rig.prefetcher.fetched_tokens == 24

    run(test)


def test_who_lacks_more_fetches_the_rest_afterwards() -> None:
    other_prompt = (*PROMPT[:16], *range(100, 124))
    rest = tuple(block_hashes(ROOT, other_prompt[:32], BLOCK_TOKENS)[2:])

    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        first = asyncio.create_task(rig.prefetch())
        await rig.fetcher.is_asked.wait()
        prefetching = rig.prefetcher.prefetch(RequestId("b"), PLAN, other_prompt, "salt", MINE, rig.cancelled)
        second = asyncio.create_task(prefetching)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(rig.engine.asked) == 1, "it waits for what is under way"
        rig.engine.reserved = Reserved((BlockId(1), BlockId(2)), rest, BLOCKS[:2])
        rig.fetcher.may_end.set()
        rig.fetcher.fetched = Fetched((11, 12, 13), None)
        assert (await first).tokens == 24
        rig.fetcher.fetched = Fetched((14, 15), None)
        assert (await second).tokens == 8 + 16, "one block in common, and the rest"
        assert [asked[2] for asked in rig.fetcher.asked] == [NAMES, rest]

    run(test)


def test_a_shared_fetch_is_taken_back_when_the_last_that_waits_is_gone() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        first = asyncio.create_task(rig.prefetch())
        await rig.fetcher.is_asked.wait()
        second = asyncio.create_task(rig.prefetch())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not rig.fetcher.has_ended.is_set() and not second.done()
        rig.cancelled.set()
        assert (await second).tokens == 0
        await rig.fetcher.has_ended.wait()

    run(test)


def test_who_shares_a_fetch_waits_no_longer_than_computing_its_part_takes() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        first = asyncio.create_task(rig.prefetch())
        await rig.fetcher.is_asked.wait()
        second = await rig.prefetch(compute_s=0.05, blocks=2)
        assert second.tokens == 0 and second.seconds < 0.05 + SOON_S
        assert not first.done() and not rig.fetcher.has_ended.is_set()
        rig.fetcher.may_end.set()
        assert (await first).tokens == 24

    run(test)


# ---- never longer than computing


@pytest.mark.parametrize(("compute_s", "prompt_s"), [(0.5, 100.0), (10.0, 0.5)])
def test_a_fetch_is_taken_back_in_time_and_what_came_by_then_counts(
    compute_s: float, prompt_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "LATE_SHARE", 0.3)  # much less, so that a machine that has much to do is no matter

    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        prefetched = await rig.prefetch(compute_s=compute_s)
        assert prefetched.tokens == 8
        assert 0.09 < prefetched.seconds < SOON_S
        assert rig.fetcher.asked[0][-1] == pytest.approx(0.45)
        assert rig.outcomes() == {"late": 1}
        assert rig.engine.adopted == [(RESERVED, (11,), MINE)]

    run(test, prompt_s=prompt_s)


def test_a_fetch_of_which_something_has_landed_is_waited_for_longer() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        nothing = await rig.prefetch(compute_s=0.3)
        rig.fetcher.lands = 2
        most = await rig.prefetch(compute_s=0.3)
        assert nothing.seconds >= (0.5 - 0.1) * 0.3
        assert most.seconds >= 0.9 * 0.3
        assert rig.outcomes() == {"late": 2}

    run(test)


def test_one_that_has_no_patience_takes_the_fetch_back_for_all_that_wait_for_the_same() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        first = asyncio.create_task(rig.prefetch(compute_s=0.2))
        await rig.fetcher.is_asked.wait()
        rig.fetcher.linked.clear()  # what is lacking then is computed
        second = asyncio.create_task(rig.prefetch())
        assert [(await waiting).tokens for waiting in (first, second)] == [8, 8]

    run(test)


def test_a_request_does_not_wait_for_a_fetch_that_does_not_end_and_its_blocks_come_back_when_it_has() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        rig.fetcher.hears = False
        began_s = monotonic()
        prefetched = await rig.prefetch(compute_s=0.1)
        assert monotonic() - began_s < 0.1 + SOON_S
        assert prefetched.tokens == 0 and prefetched.seconds == pytest.approx(0.05, abs=SOON_S)
        assert not rig.engine.adopted, "somebody may still write into them"
        rig.fetcher.may_end.set()
        await rig.fetcher.has_ended.wait()
        await asyncio.sleep(0)
        assert rig.engine.adopted == [(RESERVED, (11, 12, 13), MINE)]

    run(test)


def test_blocks_that_are_not_settled_stay_reserved_until_they_are() -> None:
    async def test(rig: Rig) -> None:
        settled = asyncio.Event()

        async def settle() -> None:
            await settled.wait()

        rig.fetcher.fetched = Fetched((), TransferError("at it"), settling=asyncio.create_task(settle()))
        assert (await rig.prefetch()).tokens == 0
        assert not rig.engine.adopted and not rig.transferred
        assert rig.outcomes() == {"unsettled": 1}
        settled.set()
        async with asyncio.timeout(30):
            while not rig.engine.adopted:  # noqa: ASYNC110 - a few turns of the loop
                await asyncio.sleep(0)
        assert rig.engine.adopted == [(RESERVED, (), MINE)]

    run(test)


# ---- whoever is not there any more


def test_a_request_that_is_cancelled_waits_no_longer() -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        waiting = asyncio.create_task(rig.prefetch())
        await rig.fetcher.is_asked.wait()
        rig.cancelled.set()
        assert (await waiting).seconds < SOON_S
        await rig.fetcher.has_ended.wait()
        await asyncio.sleep(0)
        assert rig.engine.adopted == [(RESERVED, (11,), MINE)]
        assert rig.outcomes() == {"cancelled": 1}

    run(test)


def test_one_that_is_cancelled_before_anything_was_reserved_fetches_nothing() -> None:
    async def test(rig: Rig) -> None:
        rig.cancelled.set()
        assert await rig.prefetch() == NOTHING
        assert rig.engine.adopted == [(RESERVED, (), MINE)] and not rig.fetcher.asked

    run(test)


@pytest.mark.parametrize("when", ["reserving", "fetching"])
def test_a_task_that_is_cancelled_leaves_no_blocks_behind(when: str) -> None:
    async def test(rig: Rig) -> None:
        rig.fetcher.may_end.clear()
        if when == "reserving":
            rig.engine.may_answer.clear()
        waiting = asyncio.create_task(rig.prefetch())
        if when == "reserving":
            while not rig.engine.asked:  # noqa: ASYNC110 - a few turns of the loop
                await asyncio.sleep(0)
        else:
            await rig.fetcher.is_asked.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        rig.engine.may_answer.set()
        async with asyncio.timeout(30):
            while not rig.engine.adopted:  # noqa: ASYNC110 - a few turns of the loop
                await asyncio.sleep(0)
        assert [reserved for reserved, _, _ in rig.engine.adopted] == [RESERVED]
        assert bool(rig.fetcher.asked) is (when == "fetching")

    run(test)
