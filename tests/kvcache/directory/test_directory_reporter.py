"""What a worker tells, by the calls that it makes: no Redis."""

from typing import Any

import pytest
from redis.exceptions import NoScriptError, ResponseError

from baton.clock import ManualClock
from baton.cluster.cache_events import CacheChanges, CacheEvents, unpack
from baton.cluster.lease import Lease
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from kvcache.directory.calls import PLACES, Call, Holder, Packed, Scope, Sync, copies_of, holders, in_calls, pinned
from kvcache.directory.reporter import REFILL_CALLS_MAX, News, Reporter
from kvcache.directory.scripts import NAMES_MAX, NO_NEWS, SCRIPTS, scripts
from tests.kvcache.directory.directory_redis import block, blocks

UNKNOWN = [b"unknown", 1]


class Telling:
    """A reporter, and the blocks that its worker holds."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.held: dict[Tier, bytes] = {}
        self.tokens = iter("abcdefgh")
        self.reporter = Reporter(
            Scope("p"), WorkerId("w"), "e", lambda: self.held, Lease(), self.clock, lambda: next(self.tokens)
        )

    def register(self, now_ms: int = 50_000) -> None:
        (call,) = self.reporter.begin(is_complete=True)
        assert call.script is SCRIPTS.register
        self.reporter.finish([[b"registered", now_ms, 7]])

    def write(self, now_ms: int = 50_000) -> list[Sync]:
        """All is answered."""
        calls = self.reporter.begin(is_complete=True)
        told = [sync_of(call) for call in calls]
        self.reporter.finish([ok(sync, now_ms) for sync in told])
        return told

    def changed(self, changes: CacheChanges) -> None:
        self.reporter.told(CacheEvents.of("e", 1, changes))


def sync_of(call: Call) -> Sync:
    assert call.script is SCRIPTS.sync and call.arguments[2:4] == (7, "a")
    number, as_of_ms, *rest = call.arguments[4:]
    assert isinstance(number, int) and isinstance(as_of_ms, int)
    names: list[Any] = rest[-4:]
    return Sync(number, as_of_ms, {place: packed for place, packed in zip(PLACES, names, strict=True) if packed})


def ok(sync: Sync, now_ms: int = 50_000, counts: bytes | None = None, pins: tuple[Any, ...] = ()) -> list[Any]:
    return [b"ok", now_ms, bytes(len(sync.assigned)) if counts is None else counts, list(pins)]


def names_in(told: list[Sync]) -> list[BlockHash]:
    return [name for sync in told for packed in sync.changes.values() for name in unpack(packed)]


# ---- calls


def test_no_call_has_more_names_than_it_may() -> None:
    changes: Packed = {"hbm": b"".join(blocks(*range(700))), "nowhere": b"".join(blocks(*range(700, 1100)))}
    parts = list(in_calls(changes))
    assert [sum(map(len, part.values())) // 16 for part in parts] == [NAMES_MAX, NAMES_MAX, 1100 - 2 * NAMES_MAX]
    for place, names in changes.items():
        assert b"".join(part.get(place, b"") for part in parts) == names
    assert list(in_calls({})) == list(in_calls({"hbm": b""})) == []


def test_answers_are_understood() -> None:
    told = Sync(1, 0, {"ssd": b"".join(blocks(1)), "hbm": b"".join(blocks(2, 3)), "nowhere": block(4)})
    assert copies_of(told, bytes((0, NO_NEWS, 2))) == [(block(2), 0), (block(1), 2)]
    assert copies_of(told, b"") == []
    code = (300 << 2 | 1).to_bytes(3, "big"), (5 << 2 | 2).to_bytes(3, "big")
    answer = [b"\0\2" + code[0] + code[1] + b"\1" + code[1], [[300, b"a"], [5, b"b"]]]
    a, b = Holder(WorkerId("a"), "ddr"), Holder(WorkerId("b"), "ssd")
    assert holders(answer) == [[], [a, b], [b]]
    assert pinned(b"\0\1\3", 3) == [None, "hbm", "ssd"] and pinned(b"", 2) == [None, None]


def test_scripts_differ_by_their_buckets_only() -> None:
    assert scripts(4) == SCRIPTS and scripts(3).sync.sha != SCRIPTS.sync.sha and "$" not in SCRIPTS.sync.source


# ---- what is told


def test_an_inventory_is_told_in_bounded_writes() -> None:
    telling = Telling()
    many = blocks(*range(NAMES_MAX * REFILL_CALLS_MAX + 10))
    telling.held = {"ddr": b"".join(many)}
    assert telling.reporter.has_news and telling.reporter.is_refilling
    telling.register()
    first = telling.write()
    assert len(first) == REFILL_CALLS_MAX and telling.reporter.has_news
    second = telling.write()
    assert names_in(first + second) == list(many)
    assert [sync.number for sync in first + second] == list(range(1, len(first) + len(second) + 1))
    assert not telling.reporter.has_news and not telling.reporter.is_refilling


def test_what_changes_while_the_inventory_is_told_is_told_as_a_change_alone() -> None:
    telling = Telling()
    many = blocks(*range(NAMES_MAX * REFILL_CALLS_MAX + 10))
    telling.held = {"ddr": b"".join(many)}
    telling.register()
    telling.write()
    telling.changed(CacheChanges({"hbm": (many[-1],)}, removed=(many[-2],)))
    told = telling.write()
    assert sorted(names_in(told)) == sorted(many[-10:])
    assert told[0].changes == {"hbm": many[-1], "nowhere": many[-2]}


def test_before_the_registration_changes_wait_in_the_inventory() -> None:
    telling = Telling()
    telling.changed(CacheChanges({"hbm": blocks(1)}))
    telling.held = {"hbm": block(1)}
    telling.register()
    assert [sync.changes for sync in telling.write()] == [{"hbm": block(1)}]


def test_what_had_no_answer_is_told_again_under_the_same_number() -> None:
    telling = Telling()
    telling.register()
    telling.write()
    telling.changed(CacheChanges({"hbm": blocks(1)}))
    lost = list(map(sync_of, telling.reporter.begin(is_complete=True)))
    for _ in range(100):
        assert list(map(sync_of, telling.reporter.begin(is_complete=True))) == lost, "what waits does not grow"
    telling.changed(CacheChanges(removed=blocks(1)))
    assert telling.write()[: len(lost)] == lost
    assert not telling.reporter.has_news


def test_only_what_is_complete_renews_the_lease() -> None:
    """And for as long only as since it was: Redis's time is reckoned from its last answer."""
    telling = Telling()
    telling.register(now_ms=50_000)
    telling.clock.advance(2.0)
    assert [sync.as_of_ms for sync in telling.write(now_ms=52_500)] == [52_000]
    telling.clock.advance(1.0)
    assert [sync_of(call).as_of_ms for call in telling.reporter.begin(is_complete=False)] == [52_000]


def test_heartbeats_are_told_too() -> None:
    telling = Telling()
    telling.register()
    assert [telling.write()[0].changes for _ in range(2)] == [{}, {}]


@pytest.mark.parametrize("reply", [UNKNOWN, ResponseError("OOM")])
def test_who_is_not_known_begins_anew(reply: Any) -> None:
    telling = Telling()
    telling.register()
    telling.changed(CacheChanges({"hbm": blocks(1)}))
    telling.reporter.begin(is_complete=True)
    telling.reporter.finish([reply])
    assert telling.reporter.registered is None
    assert telling.reporter.has_news == (reply is UNKNOWN), "what was refused waits for the heartbeat"
    if reply is not UNKNOWN:
        assert telling.reporter.begin(is_complete=True) == [] and telling.reporter.finish([]) == News()
        telling.clock.advance(Lease().heartbeat_s)
    (call,) = telling.reporter.begin(is_complete=True)
    assert call.script is SCRIPTS.register and call.arguments[5] == 0, "no new life"
    telling.reporter.finish([[b"registered", 1, 8]])
    assert telling.reporter.registered and telling.reporter.has_news


def test_who_was_taken_over_from_waits(caplog: pytest.LogCaptureFixture) -> None:
    telling = Telling()
    for _ in range(3):
        assert telling.reporter.begin(is_complete=True)
        telling.reporter.finish([[b"replaced", 1]])
        telling.clock.advance(Lease().heartbeat_s)
        assert not telling.reporter.has_news
    assert len(caplog.messages) == 1


def test_forgotten_scripts_are_no_loss() -> None:
    telling = Telling()
    telling.register()
    telling.write()
    telling.changed(CacheChanges({"hbm": blocks(1)}))
    told = list(map(sync_of, telling.reporter.begin(is_complete=True)))
    telling.reporter.finish([NoScriptError()] * len(told))
    assert telling.reporter.registered and telling.write() == told


def test_answers_to_a_registration_that_was_lost_meanwhile_mean_nothing() -> None:
    telling = Telling()
    telling.register()
    told = list(map(sync_of, telling.reporter.begin(is_complete=True)))
    telling.reporter.lost()
    telling.reporter.finish([ok(sync) for sync in told])
    assert telling.reporter.registered is None and telling.reporter.has_news


def test_news_of_copies_and_pins() -> None:
    telling = Telling()
    telling.register()
    telling.write()
    telling.changed(CacheChanges({"hbm": blocks(1, 2)}))
    (told,) = map(sync_of, telling.reporter.begin(is_complete=True))
    pins = [b"5-0", b"50000", block(3)], [b"6-0", b"53000", block(1) + block(2)]
    news = telling.reporter.finish([ok(told, 50_000, bytes((NO_NEWS, 3)), pins)])
    assert news.copies == [(block(2), 3)]
    assert [(pin.names, pin.until_s) for pin in news.pins] == [([block(3)], 100.0), (list(blocks(1, 2)), 103.0)]
    (call,) = telling.reporter.begin(is_complete=True)
    assert b"6-0" in call.arguments


def test_the_dead_are_swept_with_heartbeats_only() -> None:
    telling = Telling()
    telling.register()
    budgets = []
    for seconds in (0.0, 0.5, 0.5, 0.1):
        telling.clock.advance(seconds)
        budgets.append(telling.reporter.begin(is_complete=True)[-1].arguments[8])
    assert [bool(budget) for budget in budgets] == [True, False, True, False]
