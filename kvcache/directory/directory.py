"""One worker's hold on the directory of blocks in Redis: tells what this worker holds, asks what others hold.

While Redis is away nothing of it raises: what changes meanwhile is told when Redis is back, look-ups return nothing.
The directory may lag: a new copy is named a write later (20 ms or so); one that is gone is named for as long as a lease
at most, whatever dies, and it does not name a holder beyond a block's first 21.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError, RedisError

from baton.clock import Clock, monotonic
from baton.cluster.cache_events import CacheEvents
from baton.cluster.lease import Lease
from baton.cluster.redis_client import describe
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from kvcache.directory import calls
from kvcache.directory.calls import Call, Holder, Identity, Scope
from kvcache.directory.reporter import Inventory, Reporter
from kvcache.directory.scripts import NAMES_MAX, Script

log = logging.getLogger(__name__)

ASKED_NAMES_MAX = 8 * NAMES_MAX
"""In one look-up or pin: 4,096, in one round trip."""
ANSWER_TIMEOUT_S = 0.25
"""Of look-ups and pins: later than that nobody needs them. (Closing the connection then takes the client another second
now and then.)"""
OnPins = Callable[[Sequence[BlockHash], float], None]
"""Blocks, and until when (this worker's monotonic seconds) a peer wants them kept."""
OnCopies = Callable[[Sequence[tuple[BlockHash, int]]], None]
"""Blocks that this worker now holds, and how many others did when it told so."""


class Directory:
    """Lives on the loop and follows a CacheEventPublisher (`publisher.join(directory)`), whose writes take its syncs
    along, news or not, once a heartbeat at least. The client stays the caller's.

    `inventory`: what the publisher has recorded, packed names by tier (`publisher.inventory().blocks`).
    `on_pins` and `on_copies` are called on the loop, after the write whose answer they came with.
    """

    def __init__(
        self,
        redis: Redis,
        key_prefix: str,
        worker_id: WorkerId,
        epoch: str,
        inventory: Inventory,
        lease: Lease | None = None,
        clock: Clock = monotonic,
        *,
        on_pins: OnPins | None = None,
        on_copies: OnCopies | None = None,
    ) -> None:
        self._redis, self._scope, self._worker_id = redis, Scope(key_prefix), worker_id
        self._reporter = Reporter(
            self._scope, worker_id, epoch, inventory, lease or Lease(), clock, lambda: secrets.token_hex(4)
        )
        self._known_scripts: set[str] = set()
        self._is_asking_in_vain = False
        self.on_pins, self.on_copies = on_pins, on_copies

    @property
    def registered(self) -> Identity | None:
        """As what Redis last knew this worker."""
        return self._reporter.registered

    @property
    def is_complete(self) -> bool:
        """Whether the whole inventory was told since Redis last knew nothing of this worker."""
        return not self._reporter.is_refilling

    async def start(self) -> None:
        """Registers, so that the next write can tell something; where Redis is away a later write will."""
        with contextlib.suppress(RedisError, OSError):
            async with self._redis.pipeline(transaction=False) as commands:
                self.begin(commands, is_complete=False)
                self.finish(await commands.execute(raise_on_error=False))

    async def close(self) -> None:
        """Idempotent; after the publisher's. From then on nobody finds this worker's blocks; if Redis is away now, then
        when the lease has run out."""
        if who := self._reporter.registered:
            self._reporter.lost()
            with contextlib.suppress(RedisError, OSError):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._ask([calls.leave(self._scope, who)])

    # ---- as the publisher's follower

    @property
    def has_news(self) -> bool:
        return self._reporter.has_news

    def told(self, batch: CacheEvents) -> None:
        self._reporter.told(batch)

    def lost(self) -> None:
        self._reporter.lost()

    def begin(self, commands: Pipeline, is_complete: bool) -> None:
        self._add(commands, self._reporter.begin(is_complete))

    def finish(self, replies: Sequence[Any]) -> None:
        self._note_scripts(replies)
        news = self._reporter.finish(replies)
        if news.copies and self.on_copies:
            self.on_copies(news.copies)
        for pin in news.pins:
            if self.on_pins:
                self.on_pins(pin.names, pin.until_s)

    # ---- what a worker asks: of 4,096 names at most in one call

    async def holders(self, names: Sequence[BlockHash]) -> list[list[Holder]]:
        """Who has each of them, this worker included, and in which tier. Nothing at all while Redis is away."""
        found = await self._answer(self._ask([calls.look_up(self._scope, part) for part in _parts(names)]))
        return [of_name for reply in found for of_name in calls.holders(reply)]

    async def copies(self, names: Sequence[BlockHash]) -> list[int]:
        """How many other workers have each of them. Nothing at all while Redis is away."""
        found = await self.holders(names)
        return [sum(holder.worker_id != self._worker_id for holder in of_name) for of_name in found]

    async def pin(self, names: Sequence[BlockHash], holder: WorkerId, ttl_s: float) -> list[Tier | None]:
        """Asks a holder not to drop these for so long; it learns of it with its next write, a heartbeat later at most,
        and what it has dropped by then stays dropped. Returns the tier in which each lies there, None where it does
        not (any more); all None where the holder is not alive, or has too many pins to learn of already. Nothing at
        all while Redis is away."""
        parts = _parts(names)
        found = await self._answer(self._ask([calls.pin(self._scope, part, holder, ttl_s) for part in parts]))
        return [tier for part, reply in zip(parts, found, strict=False) for tier in calls.pinned(reply, len(part))]

    # ---- the connection

    async def _answer(self, answers: Awaitable[list[Any]]) -> list[Any]:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                found = await answers
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            if not self._is_asking_in_vain:
                log.warning("The directory of blocks does not answer (%s)", describe(error))
            self._is_asking_in_vain = True
            return []
        self._is_asking_in_vain = False
        return found

    async def _ask(self, asked: Sequence[Call]) -> list[Any]:
        replies = await self._ask_once(asked)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            replies = await self._ask_once(asked)  # with the scripts themselves
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    async def _ask_once(self, asked: Sequence[Call]) -> list[Any]:
        if not asked:
            return []
        async with self._redis.pipeline(transaction=False) as commands:
            self._add(commands, asked)
            replies: list[Any] = await commands.execute(raise_on_error=False)
        self._note_scripts(replies)
        return replies

    def _add(self, commands: Pipeline, asked: Sequence[Call]) -> None:
        for call in asked:
            commands.execute_command(*self._how(call.script), 1, call.key, *call.arguments, **{NEVER_DECODE: True})

    def _how(self, script: Script) -> tuple[str, str]:
        """By its digest where Redis has had it before: else in full, which makes Redis remember it."""
        if script.sha in self._known_scripts:
            return "EVALSHA", script.sha
        self._known_scripts.add(script.sha)
        return "EVAL", script.source

    def _note_scripts(self, replies: Sequence[Any]) -> None:
        if any(isinstance(reply, NoScriptError) for reply in replies):
            self._known_scripts.clear()


def _parts(names: Sequence[BlockHash]) -> list[Sequence[BlockHash]]:
    assert len(names) <= ASKED_NAMES_MAX
    return [names[at : at + NAMES_MAX] for at in range(0, len(names), NAMES_MAX)]
