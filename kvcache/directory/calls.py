"""Calls of the directory's scripts as data: how they are written, and what their answers say. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from baton.cluster.cache_events import NAME_BYTES, CacheEvents, unpack
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS, Tier
from kvcache.directory.scripts import HOLDER_BYTES, NAMES_MAX, NO_NEWS, SCRIPTS, Script, Scripts

Place = Tier | Literal["nowhere"]
PLACES: tuple[Place, ...] = (*TIERS, "nowhere")
Packed = Mapping[Place, bytes]
"""Names, 16 bytes each, by where they are now."""
Argument = str | bytes | int


@dataclass(frozen=True, slots=True)
class Call:
    script: Script
    key: str
    """Decides on the Redis Cluster's slot; all other keys lie in the same."""
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """One cluster's directory."""

    key_prefix: str
    now_ms: str = ""
    """In place of Redis's own time, for tests that move it."""
    scripts: Scripts = SCRIPTS

    @property
    def base(self) -> str:
        return f"{{{self.key_prefix}}}:directory:"

    def call(self, script: Script, *arguments: Argument) -> Call:
        return Call(script, f"{self.base}leases", (self.base, self.now_ms, *arguments))


@dataclass(frozen=True, slots=True)
class Identity:
    """One registration: a holder's number, and the token that proves whose it is."""

    holder: int
    token: str


@dataclass(frozen=True, slots=True)
class Sync:
    """What is told in one call; the same when it is done again."""

    number: int
    as_of_ms: int
    """When it was true, on Redis's clock."""
    changes: Packed

    @property
    def assigned(self) -> list[BlockHash]:
        """In the order in which the answer counts their copies."""
        return unpack(b"".join(self.changes.get(tier, b"") for tier in TIERS))


@dataclass(frozen=True, slots=True)
class Pin:
    until_ms: int
    """On Redis's clock."""
    names: list[BlockHash]


@dataclass(frozen=True, slots=True)
class Synced:
    now_ms: int
    counts: bytes
    """One for each name assigned; none where the sync was known already."""
    pins: list[Pin]
    seen: bytes
    """Of the last of these pins."""


@dataclass(frozen=True, slots=True)
class Holder:
    worker_id: WorkerId
    tier: Tier


def register(scope: Scope, worker_id: WorkerId, epoch: str, token: str, is_fresh: bool, lease_ms: int) -> Call:
    return scope.call(scope.scripts.register, worker_id, epoch, token, int(is_fresh), lease_ms)


def sync(scope: Scope, who: Identity, told: Sync, lease_ms: int, seen: bytes = b"", sweep_entries: int = 0) -> Call:
    """`seen`: the last pin learnt of; empty: asks for none. `sweep_entries`: to be looked at for what the dead left."""
    names = (told.changes.get(place, b"") for place in PLACES)
    head = (who.holder, who.token, told.number, told.as_of_ms, lease_ms, seen, sweep_entries)
    return scope.call(scope.scripts.sync, *head, *names)


def leave(scope: Scope, who: Identity) -> Call:
    return scope.call(scope.scripts.leave, who.holder, who.token)


def look_up(scope: Scope, names: Sequence[BlockHash]) -> Call:
    assert len(names) <= NAMES_MAX
    return scope.call(scope.scripts.look_up, b"".join(names))


def pin(scope: Scope, names: Sequence[BlockHash], holder: WorkerId, ttl_s: float) -> Call:
    assert len(names) <= NAMES_MAX
    return scope.call(scope.scripts.pin, holder, round(ttl_s * 1000), b"".join(names))


# ---- answers


def synced(reply: Sequence[Any], seen: bytes) -> Synced | None:
    """None: the holder is not known. `seen`: the last pin learnt of before."""
    kind, now_ms, *more = reply
    if kind == b"unknown":
        return None
    counts, entries = more if kind == b"ok" else (b"", [])
    pins = [Pin(int(until_ms), unpack(names)) for _, until_ms, names in entries]
    return Synced(now_ms, counts, pins, entries[-1][0] if entries else seen)


def copies_of(told: Sync, counts: bytes) -> list[tuple[BlockHash, int]]:
    """Of the names that this worker did not hold before: how many others do."""
    if not counts:
        return []
    return [(name, count) for name, count in zip(told.assigned, counts, strict=True) if count != NO_NEWS]


def holders(reply: Sequence[Any]) -> list[list[Holder]]:
    """For each name that was asked for."""
    packed, workers = reply
    worker_of = {number: WorkerId(worker.decode()) for number, worker in workers}
    found, at = [], 0
    while at < len(packed):
        end = at + 1 + packed[at] * HOLDER_BYTES
        codes = [int.from_bytes(packed[i : i + HOLDER_BYTES], "big") for i in range(at + 1, end, HOLDER_BYTES)]
        found.append([Holder(worker_of[code >> 2], TIERS[code & 3]) for code in codes])
        at = end
    return found


def pinned(reply: bytes, count: int) -> list[Tier | None]:
    return [TIERS[tier - 1] if tier else None for tier in reply or bytes(count)]


# ---- changes


def changes_of(batch: CacheEvents) -> Packed:
    found: dict[Place, bytes] = {tier: batch.stored.get(tier, b"") + batch.moved.get(tier, b"") for tier in TIERS}
    found["nowhere"] = batch.removed
    return found


def in_calls(changes: Packed) -> Iterator[Packed]:
    """The same in parts of as many names as one call may have."""
    part, room = dict[Place, bytes](), NAMES_MAX * NAME_BYTES
    for place, names in changes.items():
        at = 0
        while at < len(names):
            part[place] = names[at : at + room]
            at, room = at + len(part[place]), room - len(part[place])
            if not room:
                yield part
                part, room = {}, NAMES_MAX * NAME_BYTES
    if part:
        yield part
