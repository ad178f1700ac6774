"""The directory's scripts on a real Redis, against a model in Python, and at their limits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, given, settings

from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS
from kvcache.directory import calls
from kvcache.directory.calls import Holder, Identity, Scope, Sync
from kvcache.directory.scripts import HOLDERS_MAX, NAMES_MAX, NO_NEWS, PINS_TOLD_MAX, PINS_WAITING_MAX
from tests.kvcache.directory.directory_model import DirectoryModel
from tests.kvcache.directory.directory_redis import block, blocks, carry_out, plain_client

LEASE_MS = 5000
WORKERS = [WorkerId(name) for name in "abc"]
NAMES = blocks(*range(3))


@dataclass
class Directory:
    """The calls, one at a time, at a time of ours."""

    client: "redis.Redis"
    prefix: str
    now_ms: int = 1_000_000

    @property
    def scope(self) -> Scope:
        return Scope(self.prefix, str(self.now_ms))

    def ask(self, call: calls.Call) -> Any:
        (answer,) = carry_out(self.client, [call])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def register(self, worker: WorkerId, epoch: str = "e", token: str = "t", is_fresh: bool = True) -> Identity:
        kind, _, holder = self.ask(calls.register(self.scope, worker, epoch, token, is_fresh, LEASE_MS))
        assert kind == b"registered"
        return Identity(holder, token)

    def sync(
        self, who: Identity, number: int, changes: calls.Packed, seen: bytes = b"", sweep: int = 0, age_ms: int = 0
    ) -> Any:
        told = Sync(number, self.now_ms - age_ms, changes)
        return self.ask(calls.sync(self.scope, who, told, LEASE_MS, seen, sweep))

    def holders(self, *names: BlockHash) -> list[set[Holder]]:
        return [set(found) for found in calls.holders(self.ask(calls.look_up(self.scope, names)))]

    def pin(self, names: Sequence[BlockHash], worker: WorkerId, ttl_s: float = 1.0) -> list[Any]:
        return calls.pinned(self.ask(calls.pin(self.scope, names, worker, ttl_s)), len(names))

    def key(self, name: str) -> str:
        return f"{self.scope.base}{name}"


@pytest.fixture
def directory(redis_server: EmbeddedRedis, key_prefix: str) -> Iterator[Directory]:
    with plain_client(redis_server) as client:
        made = Directory(client, key_prefix)
        yield made
        for key in client.scan_iter(f"{{{key_prefix}}}:*", count=10_000):
            client.delete(key)


# ---- against the model

workers = st.sampled_from(WORKERS)
changes = st.dictionaries(st.sampled_from(NAMES), st.sampled_from((None, 0, 1, 2)))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("register"), workers, st.sampled_from("xy"), st.booleans()),
        st.tuples(st.just("sync"), st.integers(0, 5), st.integers(0, 2), st.sampled_from((0, 100, 6000)), changes),
        st.tuples(st.just("sync"), st.integers(0, 5), st.just(1), st.just(0), changes),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.tuples(st.just("pin"), workers),
        st.tuples(st.just("time"), st.sampled_from((1, 1000, 4999, 5000))),
    ),
    max_size=30,
)


def packed(changed: dict[BlockHash, int | None]) -> calls.Packed:
    places = {tier: TIERS[tier] for tier in range(3)}
    found: dict[calls.Place, bytes] = {}
    for name, tier in changed.items():
        place: calls.Place = "nowhere" if tier is None else places[tier]
        found[place] = found.get(place, b"") + name
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_the_scripts_do_as_the_model(directory: Directory, done: list[tuple[Any, ...]]) -> None:
    for key in directory.client.keys(f"{{{directory.prefix}}}:*"):
        directory.client.delete(key)
    model, known = DirectoryModel(), list[Identity]()
    done = [*(("register", worker, "x", True) for worker in WORKERS), *done]
    for at, (what, *given_) in enumerate(done):
        model.now_ms = directory.now_ms
        if what == "register":
            worker, epoch, is_fresh = given_
            call = calls.register(directory.scope, worker, epoch, f"t{at}", is_fresh, LEASE_MS)
            kind, now_ms, *numbers = directory.ask(call)
            expected = model.register(worker, epoch, f"t{at}", is_fresh, LEASE_MS)
            assert (kind, now_ms, numbers) == (
                (b"registered", model.now_ms, [expected]) if expected else (b"replaced", model.now_ms, [])
            )
            known += [Identity(number, f"t{at}") for number in numbers]
        elif what == "sync" and known:
            which, ahead, age_ms, changed = given_
            who = known[which % len(known)]
            registered = model.registered.get(who.holder)
            number = (registered.number if registered else 0) + ahead
            answer = directory.sync(who, number, packed(changed), sweep=1, age_ms=age_ms)
            counts = model.sync(who.holder, who.token, number, model.now_ms - age_ms, LEASE_MS, changed)
            assert (list(answer[2]) if answer[0] == b"ok" else answer[0].decode()) == counts
        elif what == "leave" and known:
            who = known[given_[0] % len(known)]
            directory.ask(calls.leave(directory.scope, who))
            model.leave(who.holder, who.token)
        elif what == "pin":
            tiers = model.pin(given_[0], NAMES, 1000)
            assert directory.pin(NAMES, given_[0]) == [None if tier is None else TIERS[tier] for tier in tiers]
        elif what == "time":
            directory.now_ms += given_[0]
            model.now_ms = directory.now_ms
        found = [{holder.worker_id: holder.tier for holder in of_name} for of_name in directory.holders(*NAMES)]
        assert found == [{w: TIERS[tier] for w, tier in model.look_up(name).items()} for name in NAMES]


# ---- leases and lives


def test_a_lease_runs_from_when_the_news_was_true(directory: Directory) -> None:
    who = directory.register(WORKERS[0])
    directory.sync(who, 1, {"hbm": NAMES[0]}, age_ms=3000)
    directory.now_ms += 1999
    assert directory.holders(NAMES[0]) == [{Holder(WORKERS[0], "hbm")}]
    directory.now_ms += 1
    assert directory.holders(NAMES[0]) == [set()]
    assert directory.sync(who, 2, {})[0] == b"unknown"


def test_a_new_life_takes_over_and_the_old_one_does_not_take_it_back(directory: Directory) -> None:
    old = directory.register(WORKERS[0], "old", "1")
    directory.sync(old, 1, {"hbm": NAMES[0]})
    new = directory.register(WORKERS[0], "new", "2")
    assert directory.holders(NAMES[0]) == [set()] and directory.sync(old, 2, {})[0] == b"unknown"
    again = calls.register(directory.scope, WORKERS[0], "old", "3", False, LEASE_MS)
    assert directory.ask(again)[0] == b"replaced"
    assert directory.sync(new, 1, {"ddr": NAMES[0]})[0] == b"ok"
    directory.now_ms += LEASE_MS
    again = calls.register(directory.scope, WORKERS[0], "old", "3", False, LEASE_MS)
    assert directory.ask(again)[0] == b"registered", "when nobody else is there"


def test_a_sync_that_redis_lost_is_noticed(directory: Directory) -> None:
    who = directory.register(WORKERS[0])
    assert [directory.sync(who, number, {})[0] for number in (1, 2, 2, 1, 4)] == [
        *(b"ok", b"ok", b"again", b"again", b"unknown")
    ]


# ---- what is in Redis


def test_blocks_of_the_dead_are_swept_a_little_at_a_time(directory: Directory) -> None:
    dead, living = directory.register(WORKERS[0]), directory.register(WORKERS[1])
    many = [block(number) for number in range(2 * NAMES_MAX)]
    for number, part in enumerate(calls.in_calls({"ddr": b"".join(many)}), 1):
        directory.sync(dead, number, part)
    shared = many[0]
    directory.sync(living, 1, {"hbm": shared})
    directory.now_ms += LEASE_MS - 1
    directory.sync(living, 2, {})
    directory.now_ms += 1
    keys = f"{directory.scope.base}b:*"
    before, after, heartbeats = len(list(directory.client.scan_iter(keys, count=10_000))), -1, 0
    for number in range(3, 300):
        assert directory.sync(living, number, {}, sweep=NAMES_MAX)[0] == b"ok"
        heartbeats += 1
        if directory.client.hget(directory.key("sweep"), "left") == b"0":
            break
    after = len(list(directory.client.scan_iter(keys, count=10_000)))
    assert before > 1000 and after == 1 and heartbeats == 0x10000 // 256
    assert directory.holders(shared) == [{Holder(WORKERS[1], "hbm")}]
    assert not directory.client.exists(directory.key(f"holder:{dead.holder}"))
    assert directory.client.zcard(directory.key("leases")) == 1


def test_buckets_stay_flat_however_many_hold_a_block(directory: Directory) -> None:
    """Past 64 bytes Redis would turn the bucket into a table, several times as large, for ever."""
    alone = [directory.register(WorkerId(f"w{number}")) for number in range(HOLDERS_MAX + 3)]
    counts = [directory.sync(who, 1, {"hbm": NAMES[0]})[2][0] for who in alone]
    assert counts == [*range(HOLDERS_MAX), HOLDERS_MAX, HOLDERS_MAX, HOLDERS_MAX]
    assert len(directory.holders(NAMES[0])[0]) == HOLDERS_MAX
    bucket = directory.key(f"b:{NAMES[0].hex()[:4]}")
    assert directory.client.object("encoding", bucket) in (b"ziplist", b"listpack")
    directory.sync(alone[0], 2, {"nowhere": NAMES[0]})
    assert directory.sync(alone[-1], 2, {"hbm": NAMES[0]})[2][0] == HOLDERS_MAX - 1, "there is room again"
    assert directory.sync(alone[-1], 3, {"ssd": NAMES[0]})[2][0] == NO_NEWS


def test_a_block_that_nobody_holds_takes_no_memory(directory: Directory) -> None:
    who = directory.register(WORKERS[0])
    directory.sync(who, 1, {"hbm": b"".join(NAMES)})
    directory.sync(who, 2, {"nowhere": b"".join(NAMES)})
    assert not list(directory.client.scan_iter(f"{directory.scope.base}b:*", count=10_000))


def test_all_keys_lie_in_one_slot(directory: Directory) -> None:
    who = directory.register(WORKERS[0])
    directory.sync(who, 1, {"hbm": NAMES[0]}, sweep=1)
    directory.pin(NAMES[:1], WORKERS[0])
    found = list(directory.client.scan_iter(f"*{directory.prefix}*", count=10_000))
    assert len(found) == 6 and all(key.startswith(f"{{{directory.prefix}}}:directory:".encode()) for key in found)


# ---- pins


def test_a_holder_learns_of_pins_until_it_says_so(directory: Directory) -> None:
    who = directory.register(WORKERS[0])
    assert directory.pin(NAMES, WORKERS[0]) == [None] * 3 == directory.pin(NAMES, WORKERS[1])
    directory.sync(who, 1, {"ssd": NAMES[1]})
    assert directory.pin(NAMES, WORKERS[0], 2.5) == [None, "ssd", None]
    first = calls.synced(directory.sync(who, 2, {}, seen=b"0-0"), b"0-0")
    again = calls.synced(directory.sync(who, 3, {}, seen=b"0-0"), b"0-0")
    assert first and again and first.pins == again.pins, "the answer may have been lost"
    assert [(pin.names, pin.until_ms) for pin in first.pins] == [([NAMES[1]], directory.now_ms + 2500)]
    then = calls.synced(directory.sync(who, 4, {}, seen=first.seen), first.seen)
    assert then and then.pins == [] and then.seen == first.seen


def test_pins_that_a_holder_does_not_learn_of_are_bounded(directory: Directory) -> None:
    who = directory.register(WORKERS[0])
    directory.sync(who, 1, {"hbm": NAMES[0]})
    made = [directory.pin(NAMES[:1], WORKERS[0])[0] for _ in range(PINS_WAITING_MAX + 1)]
    assert made == ["hbm"] * PINS_WAITING_MAX + [None]
    learnt, seen = 0, b"0-0"
    for number in range(2, 2 + PINS_WAITING_MAX // PINS_TOLD_MAX + 1):
        answer = calls.synced(directory.sync(who, number, {}, seen=seen), seen)
        assert answer
        learnt, seen = learnt + len(answer.pins), answer.seen
    assert learnt == PINS_WAITING_MAX and directory.pin(NAMES[:1], WORKERS[0]) == ["hbm"]
