"""bench.tiers: its figures, the machine's own speed, and its driver before scripted workers."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
import typer

from baton.rpc import common_pb2, events_pb2, worker_pb2, worker_pb2_grpc
from bench.decode_calls import RequestFailed
from bench.models import Shape
from bench.tiers import driver as driver_module
from bench.tiers.__main__ import parse_compression, parse_lengths, rate_table, ttft_table
from bench.tiers.driver import FILLER_TOKENS, fillers_for, measure, peer_rate
from bench.tiers.figures import BLOCK_TOKENS, SOURCES, Measured, Rate, Sample, Source
from bench.tiers.raw import READ_BYTES, disk_read_gb_per_s, memcpy_gb_per_s
from bench.tiers.workers import POOL_BLOCKS

SHAPE = Shape(layers=2, hidden=64, heads=4, kv_heads=2, vocabulary=500)


def sample(
    source: Source, ttft_s: float, *, tokens: int = 512, turn: int = 0, token_id: int = 7, **kw: float
) -> Sample:
    return Sample(source, tokens, turn, token_id, ttft_s, kw.get("cold_s", 1.0), 480, kw.get("moved_s", 0.0))


def measured(*samples: Sample) -> Measured:
    rates = [Rate("ddr", 9.0), Rate("ddr", 6.0, "always"), Rate("ssd", 1.5), Rate("peer", 2.0)]
    return Measured(samples, rates, 10.0, 2.0, True)


# ---- figures


def test_ratios_are_of_times_in_one_turn() -> None:
    cold = [
        sample("cold", 1.0, turn=0),
        sample("cold", 4.0, turn=1, cold_s=4.0),
        sample("cold", 2.0, turn=2, cold_s=2.0),
    ]
    ddr = [sample("ddr", 0.1, turn=0), sample("ddr", 2.0, turn=1, cold_s=4.0), sample("ddr", 0.4, turn=2, cold_s=2.0)]
    found = measured(*cold, *ddr)
    assert (found.ttft_s("cold", 512), found.of_cold("cold", 512)) == (2.0, 1.0)
    assert (found.ttft_s("ddr", 512), found.of_cold("ddr", 512)) == (0.4, 0.2)
    assert found.ttft_s("ssd", 512) is None and found.of_cold("ddr", 4096) is None


def test_first_tokens_are_compared_with_the_cold_one_of_the_turn() -> None:
    right = [
        sample("cold", 1),
        sample("hbm", 1),
        sample("cold", 1, turn=1, token_id=8),
        sample("ddr", 1, turn=1, token_id=8),
    ]
    assert measured(*right).wrong_tokens == 0
    wrong = [sample("peer", 1, token_id=8), sample("ssd", 1, turn=1)]
    assert measured(*right, *wrong).wrong_tokens == 2


def test_the_result_has_the_agreed_keys() -> None:
    found = measured(sample("ddr", 0.1, moved_s=0.05), sample("cold", 1.0), sample("cold", 3.0, tokens=1024))
    told = json.loads(json.dumps(found.as_json()))
    assert (told["memcpy_gb_per_s"], told["disk_read_gb_per_s"], told["wrong_first_tokens"]) == (10.0, 2.0, 0)
    assert [(each["tokens"], each["source"], each["ttft_s"]) for each in told["ttft"]] == [
        (512, "cold", 1.0),
        (512, "ddr", 0.1),
        (1024, "cold", 3.0),
    ]
    assert (told["ttft"][1]["waited_s"], told["ttft"][1]["reused_tokens"]) == (0.05, 480)
    assert told["restore"] == [
        {"source": "ddr", "gb_per_s": 9.0},
        {"source": "ssd", "gb_per_s": 1.5},
        {"source": "peer", "gb_per_s": 2.0},
    ]
    assert told["restore_ddr_verified"] == {"sampled": 9.0, "always": 6.0}


def test_tables_have_a_row_for_each_length_and_rate() -> None:
    found = measured(sample("cold", 1.0), sample("ddr", 0.1), sample("cold", 3.0, tokens=1024))
    assert ttft_table(found).row_count == 2
    assert rate_table(found).row_count == 4 + 2


def test_the_peers_rate_is_that_of_the_best_of_the_longest() -> None:
    samples = [sample("peer", 1, moved_s=moved_s) for moved_s in (0.02, 0.01)]
    token_bytes = 2 * SHAPE.layers * SHAPE.kv_heads * (SHAPE.hidden // SHAPE.heads) * 2
    others = [sample("peer", 1, moved_s=1e-9, tokens=tokens) for tokens in (480, 1024)]  # shorter; not all of it came
    rate = peer_rate([*samples, *others, sample("cold", 1, tokens=512)], SHAPE)
    assert [each.is_whole for each in others] == [True, False]
    with pytest.raises(RequestFailed, match="as a whole"):
        peer_rate(others[1:], SHAPE)
    assert rate.source == "peer" and rate.gb_per_s == pytest.approx(480 * token_bytes / 0.01 / 1e9)


# ---- options


def test_lengths_that_the_model_has_no_room_for() -> None:
    assert parse_lengths("512,8192") == [512, 8192]
    for text in ("", "0", "127", "8193", "many", "512,"):
        with pytest.raises(typer.BadParameter):
            parse_lengths(text)


def test_ways_to_keep_kv() -> None:
    assert (parse_compression("none"), parse_compression("int8")) == ("none", "int8")
    with pytest.raises(typer.BadParameter, match="fp4"):
        parse_compression("fp4")


# ---- the machine


def test_the_machines_own_speed_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert memcpy_gb_per_s(1 << 20) > 0
    rate, is_direct = disk_read_gb_per_s(tmp_path, 2 * READ_BYTES + 5)
    assert rate > 0 and isinstance(is_direct, bool)
    assert not list(tmp_path.iterdir())


# ---- the driver


class ScriptedWorker(worker_pb2_grpc.DecodeWorkerServicer, worker_pb2_grpc.WorkerServicer):
    """Says that prompts that it has seen were found in its lowest tier, as far as fillers came between."""

    def __init__(
        self, tier: "events_pb2.Tier" = events_pb2.TIER_DDR, *, evicts: bool = True, fetches: bool = True
    ) -> None:
        self.tier, self.evicts, self.fetches = tier, evicts, fetches
        self.submits = list[worker_pb2.Submit]()
        self.hit_tokens = 0

    was_killed = False

    async def Serve(self, requests: AsyncIterator[worker_pb2.ServeRequest], _: object) -> object:  # noqa: N802
        async for request in requests:
            yield worker_pb2.ServeResponse(outputs=[self._answer(request.submit)])

    def _answer(self, submit: worker_pb2.Submit) -> worker_pb2.TokenOutput:
        seen = any(before.prompt == submit.prompt for before in self.submits)
        came_between = bool(self.submits) and len(self.submits[-1].prompt) == FILLER_TOKENS
        self.submits.append(submit)
        blocks = (len(submit.prompt) - 1) // BLOCK_TOKENS
        cached = blocks * BLOCK_TOKENS if seen else 0
        if seen and (came_between or self.was_killed) and self.evicts and len(submit.prompt) < FILLER_TOKENS:
            self.hit_tokens += cached
        timeline = common_pb2.Timeline(restore_s=0.01 if came_between else 0)
        if submit.HasField("fetch") and self.fetches:
            timeline.fetched_tokens, timeline.fetch_s = submit.fetch.blocks * BLOCK_TOKENS, 0.02
            cached = timeline.fetched_tokens
        return worker_pb2.TokenOutput(token_ids=[5], timeline=timeline, cached_tokens=cached)

    async def GetCacheStatus(self, _: object, __: object) -> worker_pb2.CacheStatus:  # noqa: N802
        return worker_pb2.CacheStatus(tiers=[worker_pb2.TierStatus(tier=self.tier, hit_tokens=self.hit_tokens)])


class ScriptedWorkers:
    def __init__(self, scripts: Mapping[str, ScriptedWorker], addresses: Mapping[str, str]) -> None:
        self._scripts, self.addresses = scripts, addresses

    def restart(self, name: str) -> None:
        self._scripts[name].was_killed = True


@asynccontextmanager
async def served(scripts: Mapping[str, ScriptedWorker]) -> AsyncIterator[ScriptedWorkers]:
    async with AsyncExitStack() as stack:
        addresses = {}
        for name, script in scripts.items():
            server = grpc.aio.server()
            worker_pb2_grpc.add_DecodeWorkerServicer_to_server(script, server)
            worker_pb2_grpc.add_WorkerServicer_to_server(script, server)
            addresses[name] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield ScriptedWorkers(scripts, addresses)


@pytest.fixture(autouse=True)
def settles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "SETTLED_POLL_S", 0.0)


def scripts() -> dict[str, ScriptedWorker]:
    return {"ddr": ScriptedWorker(), "ssd": ScriptedWorker(events_pb2.TIER_SSD), "peer": ScriptedWorker()}


def run(workers: Mapping[str, ScriptedWorker], lengths: list[int], turns: int = 1) -> list[Sample]:
    async def main() -> list[Sample]:
        async with served(workers) as running:
            return await measure(running, SHAPE, lengths, turns, 1, lambda: None)

    return asyncio.run(main())


def fillers_of(worker: ScriptedWorker) -> set[tuple[int, ...]]:
    return {tuple(submit.prompt) for submit in worker.submits if len(submit.prompt) == FILLER_TOKENS}


def test_every_prompt_is_asked_from_every_source() -> None:
    workers = scripts()
    samples = run(workers, [128, 200], turns=2)
    cells = [(tokens, turn) for turn in (0, 1) for tokens in (128, 200)]
    assert [(each.tokens, each.turn, each.source) for each in samples] == [
        *((*cell, source) for cell in cells for source in ("cold", "hbm", "ddr", "peer")),
        *((*cell, "ssd") for cell in cells),
    ]
    assert {each.source for each in samples} == set(SOURCES)
    by_source = {each.source: each for each in samples if each.tokens == 200}
    assert (by_source["cold"].reused_tokens, by_source["hbm"].reused_tokens, by_source["hbm"].moved_s) == (0, 192, 0)
    assert (by_source["ddr"].moved_s, by_source["peer"].moved_s) == (0.01, 0.02)
    assert all(each.ttft_s > 0 and each.cold_s > 0 for each in samples)
    plans = [submit.fetch for submit in workers["peer"].submits]
    assert {plan.blocks for plan in plans} == {127, 3, 6} and all(plan.compute_s > 0 for plan in plans)
    asked = [submit for submit in workers["ddr"].submits if len(submit.prompt) < FILLER_TOKENS]
    assert len({submit.cache_salt for submit in asked}) == 5, "each turn's prompt, and the one that warms up"
    assert len(fillers_of(workers["ddr"])) == fillers_for(POOL_BLOCKS["ddr"]) == 6
    assert len(workers["ssd"].submits) == 2 * 5, "cold, and again after it was killed"


def test_a_prompt_that_does_not_leave_hbm_ends_the_run() -> None:
    with pytest.raises(RequestFailed, match="of 96 tokens only 0 lay in ddr"):
        run({**scripts(), "ddr": ScriptedWorker(evicts=False)}, [128])


def test_a_peer_from_which_nothing_comes_ends_the_run() -> None:
    with pytest.raises(RequestFailed, match="nothing comes from the peer"):
        run({**scripts(), "peer": ScriptedWorker(fetches=False)}, [128])
