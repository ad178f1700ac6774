"""What one worker tells the directory, and when: registrations, syncs, the inventory after a loss. Pure."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import NoScriptError, RedisError

from baton.clock import Clock
from baton.cluster.cache_events import CacheEvents, unpack
from baton.cluster.lease import Lease
from baton.cluster.redis_client import describe
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from kvcache.directory import calls
from kvcache.directory.calls import Call, Identity, Packed, Pin, Scope, Sync

log = logging.getLogger(__name__)

REFILL_CALLS_MAX = 8
"""Of the inventory, in one write: some 8 ms of Redis's time, in calls between which others have their turn."""
SWEEP_ENTRIES = 512
"""That one heartbeat looks at while there are dead holders' entries in the directory."""
Inventory = Callable[[], Mapping[Tier, bytes]]


@dataclass(frozen=True, slots=True)
class PinnedUntil:
    names: list[BlockHash]
    until_s: float
    """On this worker's clock."""


@dataclass(slots=True)
class News:
    """What answers told of this worker's own blocks."""

    pins: list[PinnedUntil] = field(default_factory=list)
    copies: list[tuple[BlockHash, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Registration:
    """From the moment that Redis knows of it. Redis's time is reckoned from its last answer, never ahead of it."""

    who: Identity
    redis_ms: int
    heard_s: float
    true_as_of_ms: int
    """What the last sync made was true, and complete, at that time."""
    refill: Iterator[Packed] | None
    """What is yet to be told of the inventory."""
    number: int = 0
    """Of the last sync made."""
    seen: bytes = b"0-0"
    swept_s: float = float("-inf")
    unanswered: deque[Sync] = field(default_factory=deque)
    changed: set[BlockHash] = field(default_factory=set)
    """While the inventory is being told: what has changed since it was taken, and is told as changes."""

    def redis_now_ms(self, now_s: float) -> int:
        return self.redis_ms + int((now_s - self.heard_s) * 1000)


class Reporter:
    """One worker's side of the directory, without the connection.

    `begin` gives the calls of the next write, `finish` takes their answers; if `finish` does not come, the next
    `begin` tells the same again under the same numbers, and more. Where Redis says that it knows nothing of this
    worker, everything begins anew with the inventory.
    Memory: a few batches; while the inventory is told 16 bytes a block, and the names that change meanwhile.
    """

    def __init__(
        self,
        scope: Scope,
        worker_id: WorkerId,
        epoch: str,
        inventory: Inventory,
        lease: Lease,
        clock: Clock,
        draw_token: Callable[[], str],
    ) -> None:
        self.scope = scope
        self._worker_id, self._epoch, self._inventory = worker_id, epoch, inventory
        self._lease, self._clock, self._draw_token = lease, clock, draw_token
        self._registration: _Registration | None = None
        self._token = ""
        """Of the registration that is being asked for."""
        self._has_registered = False
        self._is_refused = False
        self._refused_s = float("-inf")
        self._told: list[Packed] = []
        self._asking: _Registration | None = None
        """For whom the last `begin` asked; None: for a registration."""

    @property
    def registered(self) -> Identity | None:
        return self._registration.who if self._registration else None

    @property
    def has_news(self) -> bool:
        """Whether to write soon. Who was refused asks again a heartbeat later."""
        if (known := self._registration) is None:
            return not self._is_refused
        return bool(known.unanswered or known.refill or self._told)

    @property
    def is_refilling(self) -> bool:
        return self._registration is None or self._registration.refill is not None

    def told(self, batch: CacheEvents) -> None:
        if (known := self._registration) is None:
            return  # the inventory that is told after the registration has it
        changes = calls.changes_of(batch)
        self._told.append(changes)
        if known.refill is not None:
            for names in changes.values():
                known.changed.update(unpack(names))

    def lost(self) -> None:
        """Changes were dropped: the registration is good for nothing."""
        self._drop_registration()

    # ---- a write

    def begin(self, is_complete: bool) -> list[Call]:
        """`is_complete`: nothing has changed in this worker that was not `told`."""
        self._asking = known = self._registration
        now_s = self._clock()
        if known is None:
            return self._registering() if now_s - self._refused_s >= self._lease.heartbeat_s else []
        self._add_syncs(known, known.redis_now_ms(now_s) if is_complete else known.true_as_of_ms)
        sweep_entries = SWEEP_ENTRIES if now_s - known.swept_s >= self._lease.heartbeat_s else 0
        if sweep_entries:
            known.swept_s = now_s
        *syncs, last = known.unanswered
        return [
            *(calls.sync(self.scope, known.who, each, self._lease_ms) for each in syncs),
            calls.sync(self.scope, known.who, last, self._lease_ms, known.seen, sweep_entries),
        ]

    def _registering(self) -> list[Call]:
        self._token = self._draw_token()
        is_fresh = not self._has_registered
        return [calls.register(self.scope, self._worker_id, self._epoch, self._token, is_fresh, self._lease_ms)]

    def _add_syncs(self, known: _Registration, true_as_of_ms: int) -> None:
        """One at least waits then, if only to renew the lease; the last alone is true as of that time. While earlier
        ones have no answer there are added no more than the few batches that may be told meanwhile."""
        parts = [part for changes in self._told for part in calls.in_calls(changes)]
        self._told = []
        if not known.unanswered:
            parts = [*parts, *self._next_of_inventory(known)] or [{}]
        for place, part in enumerate(parts, 1):
            if place == len(parts):
                known.true_as_of_ms = true_as_of_ms
            known.number += 1
            known.unanswered.append(Sync(known.number, known.true_as_of_ms, part))

    def _next_of_inventory(self, known: _Registration) -> list[Packed]:
        parts: list[Packed] = []
        while known.refill is not None and len(parts) < REFILL_CALLS_MAX:
            part = next(known.refill, None)
            if part is None:
                known.refill, known.changed = None, set()
            else:
                parts.append(_without(part, known.changed))
        return parts

    def finish(self, replies: Sequence[Any]) -> News:
        """One to each call of the last `begin`, in their order; an exception where Redis refused it."""
        news = News()
        if self._asking is not self._registration:
            return news  # it was lost while it asked
        for reply in replies:
            if isinstance(reply, NoScriptError):
                break  # Redis has forgotten the scripts: neither this nor what follows was carried out
            if isinstance(reply, RedisError):
                self._refused(f"Redis refuses it ({describe(reply)})")
                break
            if self._registration is None:
                self._take_registration(reply)
            elif not self._take_synced(self._registration, reply, news):
                break
        return news

    def _take_registration(self, reply: Sequence[Any]) -> None:
        kind, now_ms, *numbers = reply
        if kind == b"replaced":
            self._refused("another process goes by its name")
            return
        who, refill = Identity(numbers[0], self._token), calls.in_calls(_as_places(self._inventory()))
        self._registration = _Registration(who, now_ms, self._clock(), now_ms, refill)
        self._has_registered = True

    def _take_synced(self, known: _Registration, reply: Sequence[Any], news: News) -> bool:
        if (answer := calls.synced(reply, known.seen)) is None:
            self._drop_registration()
            return False
        self._is_refused = False
        told = known.unanswered.popleft()
        known.redis_ms, known.heard_s, known.seen = answer.now_ms, self._clock(), answer.seen
        news.copies += calls.copies_of(told, answer.counts)
        news.pins += [self._here(pin, known) for pin in answer.pins]
        return True

    def _here(self, pin: Pin, known: _Registration) -> PinnedUntil:
        return PinnedUntil(pin.names, known.heard_s + (pin.until_ms - known.redis_ms) / 1000)

    def _refused(self, why: str) -> None:
        if not self._is_refused:
            log.warning("The directory does not name the blocks of %s: %s", self._worker_id, why)
        self._drop_registration()
        self._is_refused, self._refused_s = True, self._clock()

    def _drop_registration(self) -> None:
        self._registration, self._told = None, []

    @property
    def _lease_ms(self) -> int:
        return round(self._lease.expiry_s * 1000)


def _as_places(inventory: Mapping[Tier, bytes]) -> Packed:
    return {tier: names for tier, names in inventory.items() if names}


def _without(part: Packed, changed: Set[BlockHash]) -> Packed:
    if not changed:
        return part
    return {place: b"".join(name for name in unpack(names) if name not in changed) for place, names in part.items()}
