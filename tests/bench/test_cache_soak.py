"""bench.cache_soak: its load before a server that answers as scripted, its watch before scripted workers."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from scripted_server import Answer, ScriptedServer, send_json

from baton.rpc import events_pb2, worker_pb2, worker_pb2_grpc
from bench.cache_soak import load
from bench.cache_soak.__main__ import JUDGED_LOOKS_MIN, as_json, complaints, growing, is_success, tables
from bench.cache_soak.load import Tally, ask_until
from bench.cache_soak.watch import Footprint, Watch
from engine.recall.text import NOBODY, Ledger, make_ledger

LEDGERS = [make_ledger(5, seed) for seed in range(40)]
SMALL = Footprint(rss_bytes=1000, descriptors=40, threads=10)


# ---- the load


def owner_of(request: dict[str, Any]) -> str:
    ledger, asked = (message["content"] for message in request["messages"])
    (name,) = [each.owner(asked.split()[-1].rstrip("?")) for each in LEDGERS if each.text == ledger] or [NOBODY]
    return name


def reply(name: str) -> bytes:
    usage = {"prompt_tokens": 50, "prompt_tokens_details": {"cached_tokens": 32}}
    return json.dumps({"choices": [{"message": {"content": f" {name}.\n"}}], "usage": usage}).encode()


async def right(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await send_json(writer, 200, reply(owner_of(request)))


def ask(answer: Answer, *, questions: int = 12, concurrency: int = 2, seed: int = 1) -> tuple[Tally, ScriptedServer]:
    async def main() -> tuple[Tally, ScriptedServer]:
        tally, asked = Tally(), list[int]()
        async with ScriptedServer(answer) as server:
            now = lambda: float(len(asked))  # noqa: E731 - time goes on by the question
            await ask_until(server.url, "m", LEDGERS, questions, concurrency, seed, tally, lambda: asked.append(1), now)
            return tally, server

    return asyncio.run(main())


def test_right_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GIVEN_UP_SHARE", 0.0)
    tally, server = ask(right, concurrency=3)
    assert tally.answered == len(server.requests) >= 12
    assert (tally.wrong, tally.given_up, tally.failures.total()) == (0, 0, 0)
    assert (tally.prompt_tokens, tally.cached_tokens) == (50 * tally.answered, 32 * tally.answered)
    assert 1 <= server.in_progress_max <= 3
    assert all(request["temperature"] == 0 and request["model"] == "m" for request in server.requests)


def test_some_ledgers_are_asked_for_more_often_and_some_lockers_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GIVEN_UP_SHARE", 0.0)
    _, server = ask(right, questions=200)
    ledgers = [request["messages"][0]["content"] for request in server.requests]
    assert ledgers.count(LEDGERS[0].text) > 3 * ledgers.count(LEDGERS[-1].text)
    assert 0.02 < [owner_of(request) for request in server.requests].count(NOBODY) / len(ledgers) < 0.25


def test_a_wrong_name_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GIVEN_UP_SHARE", 0.0)

    async def wrong(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await send_json(writer, 200, reply("Nemo"))

    tally, _ = ask(wrong)
    assert tally.wrong == tally.answered > 0


def test_refusals_and_broken_connections_are_failures_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GIVEN_UP_SHARE", 0.0)

    async def refuse(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await send_json(writer, 503, b"{}")

    async def break_off(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        writer.close()

    assert list(ask(refuse)[0].failures) == ["HTTP Error 503: X"]
    tally, _ = ask(break_off)
    assert tally.failures.total() >= 12 and not tally.answered


def test_a_client_that_goes_away_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GIVEN_UP_SHARE", 1.0)
    monkeypatch.setattr(load, "GIVEN_UP_AFTER_S", 0.01)

    async def silence(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        del writer
        await asyncio.sleep(0.5)  # much longer than anybody waits

    tally, _ = ask(silence, questions=3, concurrency=1)
    assert (tally.given_up, tally.answered, tally.failures.total()) == (3, 0, 0)


# ---- the watch


class ScriptedWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, *tiers: worker_pb2.TierStatus) -> None:
        self.tiers = tiers

    async def GetCacheStatus(self, _: object, __: object) -> worker_pb2.CacheStatus:  # noqa: N802
        return worker_pb2.CacheStatus(tiers=self.tiers, fetched_tokens=64, dropped_blocks=3, corrupt_blocks=2)


def tier(kind: "events_pb2.Tier", blocks: int = 1, **fields: Any) -> worker_pb2.TierStatus:
    return worker_pb2.TierStatus(tier=kind, blocks=blocks, blocks_max=10, bytes=blocks, bytes_max=10, **fields)


@asynccontextmanager
async def served(worker: ScriptedWorker) -> AsyncIterator[str]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


def look(*tiers: worker_pb2.TierStatus, pid: int | None = None, address: str = "") -> Watch:
    async def main() -> Watch:
        watch, over = Watch({"a": os.getpid() if pid is None else pid}), asyncio.Event()
        over.set()
        async with served(ScriptedWorker(*tiers)) as found:
            await watch.run({"a": address or found}, over)
        return watch

    return asyncio.run(main())


def test_what_the_tiers_hold_and_found_is_seen() -> None:
    watch = look(tier(events_pb2.TIER_HBM, hit_tokens=5), tier(events_pb2.TIER_DDR, 10, hit_tokens=7))
    assert (watch.looks, watch.missed, watch.over_limit, watch.turned_off) == (1, 0, 0, set())
    assert watch.hit_tokens() == {"hbm": 5, "ddr": 7, "peer": 64}
    warm, end = watch.growth("a")
    assert warm == end and end.rss_bytes > 1 << 20 and end.threads >= 1


def test_a_tier_over_its_limit_or_turned_off_is_seen() -> None:
    watch = look(tier(events_pb2.TIER_DDR, 11), tier(events_pb2.TIER_SSD, off_reason="full"))
    assert (watch.over_limit, watch.turned_off) == (1, {"a ssd"})
    assert complaints(watch) == ["tiers held more than they may 1 times", "turned off: a ssd"]
    assert not is_success(Tally(answered=1), watch)


def test_who_does_not_answer_is_missed() -> None:
    watch = look(address="127.0.0.1:1")
    assert (watch.looks, watch.missed, watch.statuses) == (1, 1, {})
    assert not is_success(Tally(answered=1), watch)
    assert len(tables(Tally(), watch)) == 2


def test_a_process_that_is_gone_is_missed() -> None:
    gone = 2**22 - 1
    watch = look(tier(events_pb2.TIER_DDR), pid=gone)
    assert watch.missed == 1
    assert tables(Tally(), watch)[1].row_count == 1


# ---- the verdict


def watched(*footprints: Footprint, looks: int = JUDGED_LOOKS_MIN) -> Watch:
    return Watch({"a": 1}, looks=looks, footprints={"a": list(footprints)})


def test_growth_is_from_the_second_tenth_to_the_last() -> None:
    rising = [replace(SMALL, rss_bytes=number) for number in range(100)]
    warm, end = watched(*rising).growth("a")
    assert (warm.rss_bytes, end.rss_bytes) == (15, 95)


def test_growth_is_judged_in_long_runs_alone() -> None:
    calm = [SMALL] * 100
    assert growing(watched(*calm)) == []
    for more in (replace(SMALL, rss_bytes=1101), replace(SMALL, threads=13), replace(SMALL, descriptors=49)):
        ended = [*calm[:90], *[more] * 10]
        assert growing(watched(*ended)) == ["a"]
        assert complaints(watched(*ended)) == ["growing: a"]
        assert growing(watched(*ended, looks=JUDGED_LOOKS_MIN - 1)) == []
    for little in (replace(SMALL, rss_bytes=1099), replace(SMALL, threads=12), replace(SMALL, descriptors=48)):
        assert growing(watched(*calm[:90], *[little] * 10)) == []


def test_success_needs_answers_all_of_them_right() -> None:
    watch, tally = watched(*[SMALL] * 10), Tally(answered=5, given_up=1)
    assert is_success(tally, watch)
    for bad in (Tally(), Tally(answered=5, wrong=1), Tally(answered=5, failures=load.Counter({"x": 1}))):
        assert not is_success(bad, watch)


def test_the_result_can_be_told() -> None:
    watch = watched(*[SMALL] * 10)
    watch.statuses = {"a": worker_pb2.CacheStatus(tiers=[tier(events_pb2.TIER_DDR, hit_tokens=7)], corrupt_blocks=2)}
    told = json.loads(json.dumps(as_json(Tally(answered=5), watch)))
    assert (told["is_success"], told["answered"], told["corrupt_blocks"]) == (True, 5, 2)
    assert told["hit_tokens"] == {"ddr": 7, "peer": 0} and told["is_growth_judged"]
    assert told["processes"]["a"]["end"]["threads"] == 10
    assert [table.row_count for table in tables(Tally(), watch)] == [1, 1]


def test_ledgers_differ() -> None:
    assert len({ledger.text for ledger in LEDGERS}) == len(LEDGERS)
    assert isinstance(LEDGERS[0], Ledger)
