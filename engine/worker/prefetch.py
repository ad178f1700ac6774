"""Fetches the beginning of a prompt from the worker that the router's plan names, before the rest is computed.

The request waits for it as patience.py says, by what computing the same tokens would take, after the plan and after
what this worker knows of itself. Then the fetch is taken back, so that what came by then counts. Whatever is not
over soon goes on without the request, which computes what it lacks; the blocks come back to the pool when nobody writes
into them any more. Nor does a request wait for a link to be made: where there is none to that worker, one is begun for
the next request, and this one computes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from baton.clock import Clock, monotonic
from baton.errors import BatonError
from baton.ids import BlockHash, BlockId, RequestId, WorkerId
from baton.rpc import common_pb2
from engine.interface import Engine, Reserved, Retention
from engine.sequence import root_of
from engine.thread import EngineThread
from engine.worker.acquire import acquire
from engine.worker.patience import FETCH_SHARE, Patience
from engine.worker.prefetch_metrics import PrefetchMetrics
from engine.worker.running_fetch import RunningFetch
from kvcache.block_hash import block_hashes
from kvtransfer.fetch.client import Fetched
from kvtransfer.landing import Landing

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Engine)
PREFETCHES_MAX = 64
"""At one time, with those that no request waits for any more; past it prompts are computed."""
ROUNDS_MAX = 3
"""For what other requests fetch already, and for what is lacking then."""
PIN_S = 10.0
"""How long the peer is asked to keep what it is about to be asked for."""


@dataclass(frozen=True, slots=True)
class Prefetched:
    tokens: int = 0
    """Of the prompt, that lie in HBM now and were fetched."""
    seconds: float = 0.0
    """That the request has waited for them."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request asks for."""

    request_id: RequestId
    plan: common_pb2.FetchPlan
    prompt: Sequence[int]
    cache_salt: str
    retention: Retention
    cancelled: asyncio.Event


@dataclass(frozen=True, slots=True)
class _Wait:
    """For some blocks of a fetch."""

    fetch: RunningFetch
    names: Sequence[BlockHash]
    patience: Patience
    is_own: bool
    """Begun for this request."""


class BlockFetcher(Protocol):
    """kvtransfer.fetch.client.Fetcher, as it is used here."""

    def is_linked(self, address: str) -> bool: ...

    def begin_link(self, address: str) -> None: ...

    async def fetch(
        self,
        address: str,
        request_id: RequestId,
        names: Sequence[BlockHash],
        blocks: Sequence[BlockId],
        deadline_s: float,
        cancelled: asyncio.Event,
        landing: Landing,
    ) -> Fetched: ...


Pin = Callable[[Sequence[BlockHash], WorkerId, float], Awaitable[object]]
"""Asks a worker to keep blocks for so many seconds."""


class Speed(Protocol):
    """Of this worker."""

    def compute_s(self, new: int, cached: int) -> float:
        """For so many new tokens of a prompt behind the cached ones."""


class Prefetcher(Generic[E]):
    """One worker's, on its loop."""

    def __init__(
        self,
        worker_id: WorkerId,
        engine: EngineThread[E],
        fetcher: BlockFetcher,
        speed: Speed,
        metrics: PrefetchMetrics,
        on_transferred: Callable[[int, float], None],
        pin: Pin | None = None,
        is_on: bool = True,
        clock: Clock = monotonic,
    ) -> None:
        """`on_transferred` is told the bytes and seconds of what came."""
        self._worker_id, self._engine, self._fetcher, self._speed = worker_id, engine, fetcher, speed
        self._metrics, self._on_transferred, self._pin = metrics, on_transferred, pin
        self._is_on, self._clock = is_on, clock
        self._running: dict[BlockHash, RunningFetch] = {}
        """By the first block that is lacking: who lacks the same waits for the same."""
        self._behind: set[asyncio.Task[None]] = set()
        """What nobody waits for: pins, and blocks that are not settled."""

    @property
    def fetched_tokens(self) -> int:
        """Since the start."""
        return self._metrics.tokens

    async def prefetch(
        self,
        request_id: RequestId,
        plan: common_pb2.FetchPlan,
        prompt: Sequence[int],
        cache_salt: str,
        retention: Retention,
        cancelled: asyncio.Event,
    ) -> Prefetched:
        """Raises nothing of what may happen to a fetch. Ends at once when `cancelled` is set, or its task is."""
        if reason := self._reason_against(plan):
            log.debug("request %s: nothing is fetched: %s", request_id, reason)
            return NOTHING
        asked = _Asked(request_id, plan, prompt, cache_salt, retention, cancelled)
        names, blocks, waited_s = self._names(asked), 0, 0.0
        for _ in range(ROUNDS_MAX):
            wait = (
                self._join(asked, names, waited_s)
                or await self._begin(asked, waited_s)
                or self._join(asked, names, waited_s)  # there was no room, perhaps because somebody else had it
            )
            if wait is None or wait.patience.fetch_s(0) <= 0:
                break
            began_s = self._clock()
            blocks += await wait.fetch.blocks(wait.names, wait.patience, cancelled)
            waited_s += self._clock() - began_s
            if wait.is_own or cancelled.is_set():
                break
        return Prefetched(blocks * self._engine.model.layout.block_tokens, waited_s)

    async def close(self) -> None:
        """Waits for nothing any more: the region goes with the worker. Idempotent."""
        tasks = {*(fetch.task for fetch in self._running.values()), *self._behind}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reason_against(self, plan: common_pb2.FetchPlan) -> str:
        block_tokens = self._engine.model.layout.block_tokens
        if not self._is_on:
            return "this worker's settings say so"
        if not (plan.address and plan.blocks and plan.compute_s > 0):
            return "the plan is empty"
        if plan.worker_id == self._worker_id:
            return "the plan names this worker itself"
        if plan.block_tokens != block_tokens:
            return f"the other's blocks are of {plan.block_tokens} tokens, this worker's of {block_tokens}"
        if len(self._running) >= PREFETCHES_MAX:
            return f"{PREFETCHES_MAX} fetches are under way"
        return ""

    # ---- one fetch

    def _names(self, asked: _Asked) -> list[BlockHash]:
        """Of the blocks that the peer has."""
        model = self._engine.model
        block_tokens = model.layout.block_tokens
        tokens = asked.prompt[: asked.plan.blocks * block_tokens]
        return block_hashes(root_of(model, asked.cache_salt), tokens, block_tokens)

    def _join(self, asked: _Asked, names: Sequence[BlockHash], waited_s: float) -> _Wait | None:
        """For what another request fetches already."""
        for index, name in enumerate(names):
            if fetch := self._running.get(name):
                wanted = names[index:]
                patience = self._patience(asked.plan, fetch.in_common(wanted), index, waited_s)
                return _Wait(fetch, wanted, patience, is_own=False)
        return None

    async def _begin(self, asked: _Asked, waited_s: float) -> _Wait | None:
        """None: there is no link, nothing is lacking, there is no room for it, or computing it is as quick."""
        if not self._fetcher.is_linked(asked.plan.address):
            self._fetcher.begin_link(asked.plan.address)
            self._metrics.had_no_link()
            return None
        reserved = await self._reserve(asked)
        if reserved is None:
            return None
        names = reserved.names
        patience = self._patience(asked.plan, len(names), len(reserved.held), waited_s)
        if patience.left_s <= asked.plan.fetch_s or patience.fetch_s(0) <= 0 or asked.cancelled.is_set():
            self._adopt(reserved, (), asked.retention)
            return None
        if others := self._running.get(names[0]):  # begun while the engine was asked
            self._adopt(reserved, (), asked.retention)
            return _Wait(others, names, patience, is_own=False)
        fetch = RunningFetch(names, partial(self._fetch, asked, reserved, FETCH_SHARE * patience.left_s), self._clock)
        self._running[names[0]] = fetch
        fetch.task.add_done_callback(lambda _: self._running.pop(names[0]))
        return _Wait(fetch, names, patience, is_own=True)

    async def _reserve(self, asked: _Asked) -> Reserved | None:
        prompt, salt, blocks_max = asked.prompt, asked.cache_salt, asked.plan.blocks
        try:
            reserved = await acquire(self._engine, lambda engine: engine.reserve(prompt, salt, blocks_max), _give_back)
        except BatonError as error:
            log.debug("request %s: nothing is fetched: %s", asked.request_id, error)
            return None
        if reserved.names:
            return reserved
        self._adopt(reserved, (), asked.retention)
        return None

    def _patience(self, plan: common_pb2.FetchPlan, blocks: int, behind: int, waited_s: float) -> Patience:
        """With so many blocks behind others. How long computing them takes is by whoever says less."""
        block_tokens, speed = self._engine.model.layout.block_tokens, self._speed
        all_s = speed.compute_s(blocks * block_tokens, behind * block_tokens)

        def rest_share(landed: int) -> float:
            rest_s = speed.compute_s((blocks - landed) * block_tokens, (behind + landed) * block_tokens)
            return min(rest_s / all_s, 1.0) if landed else 1.0

        return Patience(min(plan.compute_s, all_s), rest_share, waited_s)

    async def _fetch(self, asked: _Asked, reserved: Reserved, deadline_s: float, fetch: RunningFetch) -> int:
        """The blocks that came. Sees to the reserved ones, whoever waits for it."""
        began_s, plan, names = self._clock(), asked.plan, reserved.names
        if self._pin is not None:
            self._leave(self._pin_there(self._pin, names, WorkerId(plan.worker_id)))
        fetched = await self._fetcher.fetch(
            plan.address, asked.request_id, names, reserved.blocks, deadline_s, fetch.taken_back, fetch.landing
        )
        self._take_in(fetched, reserved, asked.retention)
        tokens = fetched.blocks * self._engine.model.layout.block_tokens
        self._metrics.ended(fetched, len(names), tokens, self._clock() - began_s, fetch.is_late)
        if fetched.error is not None:
            log.info("request %s: %d blocks fetched: %s", asked.request_id, fetched.blocks, fetched.error)
        return fetched.blocks

    def _take_in(self, fetched: Fetched, reserved: Reserved, retention: Retention) -> None:
        if fetched.settling is not None:
            self._leave(self._adopt_when_settled(fetched.settling, reserved, retention))
            return
        self._on_transferred(fetched.transfer_bytes, fetched.transfer_s)
        self._adopt(reserved, fetched.digests, retention)

    def _adopt(self, reserved: Reserved, digests: Sequence[int], retention: Retention) -> None:
        """Before anything that is asked of the engine afterwards."""
        self._engine.post(lambda engine: engine.adopt(reserved, digests, retention))

    # ---- what goes on behind

    def _leave(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def _pin_there(self, pin: Pin, names: Sequence[BlockHash], holder: WorkerId) -> None:
        """The peer's blocks may go before it is asked for them; without the pin that is merely more likely."""
        try:
            await pin(names, holder, PIN_S)
        except Exception as error:  # Redis may fail in any way
            log.debug("%d blocks of %s were not pinned (%s)", len(names), holder, type(error).__name__)

    async def _adopt_when_settled(
        self, settling: "asyncio.Task[None]", reserved: Reserved, retention: Retention
    ) -> None:
        """The blocks stay out of the pool until nobody writes into them; for good, if that cannot be known."""
        log.warning("%d KV blocks stay out of the pool until their writer is gone", len(reserved.blocks))
        await asyncio.wait({settling})
        if settling.cancelled():  # the worker stops
            return
        if error := settling.exception():
            log.error("%d KV blocks stay out of the pool", len(reserved.blocks), exc_info=error)
            return
        self._adopt(reserved, (), retention)


NOTHING = Prefetched()


def _give_back(engine: Engine, reserved: Reserved) -> None:
    engine.adopt(reserved, (), Retention())
