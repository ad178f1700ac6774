"""What a worker, whatever its role, tells the cluster about itself: over real gRPC and a real Redis."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from redis.asyncio import Redis
from tiny_models import make_model, random_prompt

from baton.clock import ManualClock, monotonic
from baton.cluster.cache_events import NAME_BYTES, CacheChanges, CacheEvents, CacheInventory, stream_key, unpack
from baton.cluster.membership import MembershipWatch
from baton.cluster.redis_client import connect_redis
from baton.cluster.redis_server import EmbeddedRedis
from baton.cluster.worker_info import WorkerInfo
from baton.errors import SettingsError
from baton.ids import BlockHash, RequestId, WorkerId
from baton.latency import DEFAULT_LATENCY
from baton.latency_fit import LatencyFit
from baton.rpc import events_pb2, transfer_pb2, transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.sampling import SamplingParams
from baton.settings import WorkerSettings
from engine.core import LocalEngine
from engine.interface import EngineRequest, Prefill, Retention, StepResult
from engine.worker import cluster_cache, tier_metrics
from engine.worker.arrival_rate import MEMORY_S
from engine.worker.host import WorkerHost
from engine.worker.worker_servicer import WorkerServicer
from kvcache.block_hash import BlockHasher, root_hash
from kvcache.directory import directory
from kvcache.directory.directory import Directory
from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.interface import RestoreTiming
from kvcache.tiers.store import TierStore
from kvtransfer.link.proof import UNKNOWN_LINK

WAIT_S = 60
BLOCK_TOKENS = 8
GRPC_DEFAULT_BYTES_MAX = 4 * 2**20


class Worker:
    """A host, and what its role would hear."""

    def __init__(self, settings: WorkerSettings, clock: ManualClock) -> None:
        self.host = WorkerHost("decode", settings, self._take, clock=clock)
        self.clock = clock
        self.ended: dict[str, list[int]] = {}
        self.kv_tokens: set[int] = set()
        """That its record told of while it worked."""
        self._tokens: dict[str, list[int]] = {}
        self._changed = asyncio.Event()

    def _take(self, result: StepResult) -> None:
        for generated in result.generated:
            tokens = self._tokens.setdefault(generated.request_id, [])
            tokens += generated.token_ids
            if generated.finish_reason:
                self.ended[generated.request_id] = tokens
        if result.generated:
            self.kv_tokens.add(self.host.info.load.kv_tokens)
        self._changed.set()

    async def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 12, retention: Retention | None = None
    ) -> list[list[int]]:
        """The tokens of all of them, prompts and outputs."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        ids = [f"r{len(self.ended) + number}" for number in range(len(prompts))]
        for request_id, prompt in zip(ids, prompts, strict=True):
            request = EngineRequest(
                *(RequestId(request_id), tuple(prompt), params, Prefill.HERE), retention=retention or Retention()
            )
            await self.host.engine.call(lambda engine, request=request: engine.add(request))
        async with asyncio.timeout(WAIT_S):
            while not self.ended.keys() >= set(ids):
                self._changed.clear()
                await self._changed.wait()
        return [[*prompt, *self.ended[request_id]] for request_id, prompt in zip(ids, prompts, strict=True)]

    async def inventory(self) -> set[BlockHash]:
        """Of the engine's pool itself."""
        return await self.host.engine.call(lambda engine: set(engine._scheduler.pool._by_name))

    async def snapshot(self) -> list[worker_pb2.CacheSnapshot]:
        async with grpc.aio.insecure_channel(self.host.address) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).GetCacheSnapshot(worker_pb2.GetCacheSnapshotRequest())
            return [message async for message in call]


Serving = Callable[..., None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def serving(llama: Path, redis_server: EmbeddedRedis, key_prefix: str) -> Serving:
    """Runs a test with a worker that serves."""

    @asynccontextmanager
    async def running(**settings: Any) -> AsyncIterator[Worker]:
        worker = Worker(settings_of(llama, redis_server, key_prefix, **settings), ManualClock(100))
        try:
            await worker.host.load()
            await worker.host.serve("baton.v1.DecodeWorker", lambda _: None)
            yield worker
        finally:
            await worker.host.stop()

    def run(test: Callable[[Worker], Awaitable[None]], **settings: Any) -> None:
        async def main() -> None:
            async with running(**settings) as worker:
                await test(worker)

        asyncio.run(main())

    return run


def settings_of(llama: Path, redis: EmbeddedRedis, key_prefix: str, **settings: Any) -> WorkerSettings:
    base = {"model": str(llama), "redis_url": redis.url, "key_prefix": key_prefix, "device": "cpu", "threads": 1}
    base |= {"dtype": "float32", "block_tokens": BLOCK_TOKENS, "kv_blocks": 96, "chunk_tokens": 32, "self_test": False}
    return WorkerSettings(**{**base, **settings})


def names(worker: Worker, tokens: Sequence[int]) -> set[BlockHash]:
    """Of all whole blocks but that of the last token, which was never computed."""
    hasher = BlockHasher(root_hash(worker.host.model.fingerprint, BLOCK_TOKENS, "float32"), BLOCK_TOKENS)
    hasher.extend(tokens[:-1])
    return set(hasher.hashes)


def held(messages: Sequence[worker_pb2.CacheSnapshot]) -> set[BlockHash]:
    return {name for message in messages for blocks in message.blocks for name in unpack(blocks.block_hashes)}


# ---- what its cache holds


def test_a_snapshot_over_grpc_is_what_the_pool_holds(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        assert [(len(message.blocks), message.sequence) for message in await worker.snapshot()] == [(0, 0)]
        shared = random_prompt(64)
        alike = [shared, shared[:40] + random_prompt(30, seed=1), random_prompt(50, seed=2)]
        everything = await worker.generate(alike)
        found = held(await worker.snapshot())
        assert found == await worker.inventory()
        assert found == set().union(*(names(worker, tokens) for tokens in everything))

    serving(test)


def test_a_snapshot_knows_of_what_was_evicted(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        first, *others = await worker.generate([random_prompt(100, seed=seed) for seed in range(6)])
        found = held(await worker.snapshot())
        assert found == await worker.inventory()
        assert len(found) <= 30 and not names(worker, first) <= found and names(worker, others[-1]) & found

    serving(test, kv_blocks=30, sequences_max=1)


def test_a_large_snapshot_comes_in_messages_that_any_client_takes(serving: Serving) -> None:
    many = [BlockHash(number.to_bytes(NAME_BYTES, "big")) for number in range(300_000)]

    async def test(worker: Worker) -> None:
        worker.host._take(StepResult(cache_changes=CacheChanges({"hbm": tuple(many)})))
        messages = await worker.snapshot()
        assert len(messages) > 1
        assert max(message.ByteSize() for message in messages) < GRPC_DEFAULT_BYTES_MAX
        assert {(message.epoch, message.sequence) for message in messages} == {
            (worker.host.info.epoch, messages[0].sequence)
        }
        assert held(messages) == set(many)
        assert sum(len(blocks.block_hashes) for message in messages for blocks in message.blocks) == 16 * len(many)

    serving(test)


def test_a_snapshot_is_of_the_moment_of_the_call_however_slowly_it_is_read() -> None:
    names = b"".join(number.to_bytes(NAME_BYTES, "big") for number in range(20_000))
    state = {"names": names}
    servicer = WorkerServicer(
        worker_pb2.WorkerStatus,
        lambda: CacheInventory("e", 3, {"hbm": state["names"]}).messages(),
        None,  # type: ignore[arg-type]
    )

    async def main() -> list[worker_pb2.CacheSnapshot]:
        messages = []
        async for message in servicer.GetCacheSnapshot(worker_pb2.GetCacheSnapshotRequest(), None):  # type: ignore[arg-type]
            messages.append(message)
            state["names"] = b""
        return messages

    messages = asyncio.run(main())
    assert b"".join(blocks.block_hashes for message in messages for blocks in message.blocks) == names


def test_events_in_redis_make_the_same_as_a_snapshot(
    serving: Serving, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def test(worker: Worker) -> None:
        await worker.generate([random_prompt(100, seed=seed) for seed in range(4)])
        redis = Redis.from_url(redis_server.url)
        try:
            async with asyncio.timeout(WAIT_S):
                while (told := await replayed(redis, worker)) != await worker.inventory():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            await redis.aclose()
        assert told == held(await worker.snapshot())

    async def replayed(redis: Redis, worker: Worker) -> set[BlockHash]:
        blocks, sequences = set[BlockHash](), []
        for _, fields in await redis.xrange(stream_key(key_prefix, worker.host.worker_id)):
            events = CacheEvents.from_bytes(fields[b"e"])
            assert events.epoch == worker.host.info.epoch
            sequences.append(events.sequence)
            blocks |= set(unpack(events.stored.get("hbm", b"")))
            blocks -= set(unpack(events.removed))
        assert sequences == list(range(1, len(sequences) + 1))
        return blocks

    serving(test, kv_blocks=30, sequences_max=1)


# ---- its record


async def published(redis_url: str, key_prefix: str, holds: Callable[[WorkerInfo], bool]) -> WorkerInfo:
    """What others read of the only worker, as soon as that holds."""
    redis = await connect_redis(redis_url)
    watch = MembershipWatch(redis, key_prefix)
    await watch.start()
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                for info in watch.workers():
                    if holds(info):
                        return info
                await watch.changed()
    finally:
        await watch.close()
        await redis.aclose()


def test_its_record_has_all_that_placement_needs(
    serving: Serving, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def test(worker: Worker) -> None:
        await worker.generate([random_prompt(100)])
        worker.host.transferred(10**6, 0.5)
        info = await published(redis_server.url, key_prefix, lambda info: info.cache_sequence > 0)
        assert info.latency.decode != DEFAULT_LATENCY.decode
        assert info.latency.prefill != DEFAULT_LATENCY.prefill
        assert info.kv_block_bytes == 2 * 4 * BLOCK_TOKENS * 2 * 16 * 4  # k and v, layers, tokens, heads, head dim
        assert (info.layers, info.chunk_tokens, info.sequences_max, info.pool) == (4, 48, 17, "h100")
        assert (info.block_tokens, info.kv_blocks_total, info.kv_dtype) == (BLOCK_TOKENS, 96, "float32")
        assert info.state == "ready" and info.epoch == worker.host.info.epoch
        assert info.load.kv_blocks_cached == len(await worker.inventory())

    serving(test, chunk_tokens=48, sequences_max=17, pool="h100")


def test_a_start_of_its_own_is_an_epoch_of_its_own(llama: Path, redis_server: EmbeddedRedis, key_prefix: str) -> None:
    settings = settings_of(llama, redis_server, key_prefix, worker_id="same")
    hosts = [WorkerHost("decode", settings, lambda _: None) for _ in range(2)]
    assert hosts[0].worker_id == hosts[1].worker_id and hosts[0]._epoch != hosts[1]._epoch


def test_it_tells_how_many_requests_come_and_what_its_steps_read(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        assert worker.host.info.load.arrivals_per_s == 0
        for _ in range(60):
            worker.host.arrived()
        assert worker.host.info.load.arrivals_per_s == pytest.approx(60 / MEMORY_S)
        worker.clock.advance(1000)
        assert worker.host.info.load.arrivals_per_s < 1e-6
        await worker.generate([random_prompt(20)], max_tokens=60)
        assert worker.kv_tokens <= {0, *range(20, 80)} and max(worker.kv_tokens) >= 20
        assert worker.host.info.load.kv_tokens == 0

    serving(test)


# ---- how fast it is


def test_transfers_teach_it_its_bandwidth_and_empty_ones_nothing(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        worker.host.transferred(0, 5.0)
        assert worker.host.info.latency.transfer == LatencyFit().latency.transfer
        for _ in range(50):
            worker.host.transferred(10**8, 1.0)
        assert worker.host.info.latency.transfer.time_s(10**8) == pytest.approx(1.0, rel=0.05)
        assert ratios(worker, "transfer") == 50

    serving(test)


def ratios(worker: Worker, quantity: str) -> float | None:
    labels = {"role": "decode", "model": worker.host.model.name, "quantity": quantity}
    return worker.host.registry.get_sample_value("baton_latency_prediction_error_ratio_count", labels)


def test_every_step_is_compared_with_its_prediction_and_learned_from(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        assert worker.host.info.latency.decode == LatencyFit().latency.decode
        await worker.generate([random_prompt(100)], max_tokens=12)
        assert (ratios(worker, "prefill"), ratios(worker, "decode")) == (4, 11)
        assert worker.host.info.latency.decode != LatencyFit().latency.decode

    serving(test)


def test_its_self_test_is_what_it_knows_of_its_speed(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        assert worker.host.info.latency.prefill != LatencyFit().latency.prefill
        assert worker.host.info.latency.decode != LatencyFit().latency.decode
        assert worker.host.info.cache_sequence == 0
        assert not held(await worker.snapshot()) and not await worker.inventory()
        stats = worker.host.engine.stats()
        assert (stats.kv_blocks_used, stats.kv_blocks_cached, stats.steps) == (0, 0, 0)
        assert ratios(worker, "decode") == 0, "nobody relied on predictions yet"

    serving(test, self_test=True)


def test_its_tiers_are_tested_too(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        ddr = worker.host.info.latency.restore["ddr"]
        assert 10**6 < ddr.bytes_per_s < 10**12 and 0 <= ddr.latency_s < 10
        assert not await worker.inventory() and ratios(worker, "restore_ddr") == 0

    serving(test, self_test=True, ddr_bytes=2**24)


def test_a_worker_whose_tiers_fail_their_test_does_not_know_their_speed(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError

    monkeypatch.setattr(TierStore, "self_test", fail)

    async def test(worker: Worker) -> None:
        assert worker.host.info.latency.restore == {}
        assert worker.host.info.latency.prefill != LatencyFit().latency.prefill

    with caplog.at_level(logging.WARNING):
        serving(test, self_test=True, ddr_bytes=2**24)
    assert any("tiers' self-test failed" in record.message for record in caplog.records)


def test_a_worker_whose_self_test_fails_serves_with_the_default(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(LocalEngine, "self_test", fail)

    async def test(worker: Worker) -> None:
        assert worker.host.info.latency == LatencyFit().latency
        assert len((await worker.generate([random_prompt(20)]))[0]) == 32

    with caplog.at_level(logging.WARNING):
        serving(test, self_test=True)
    assert any("self-test failed" in record.message for record in caplog.records)


# ---- KV to and from others


def test_whatever_its_role_it_can_be_linked_with_both_ways(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        host = worker.host
        link = await host.links.to(host.address)
        assert (link.worker_id, link.transport) == (host.worker_id, "shm")
        ticket = transfer_pb2.FetchTicket(request_id="r")
        link.sign(ticket)
        assert host.link_book.check(ticket).layout == host.model.layout
        assert host.info.latency.transfer != LatencyFit().latency.transfer
        assert ratios(worker, "transfer") == 0, "nobody relied on predictions yet"
        assert (await worker.generate([random_prompt(100)]))[0]

    serving(test, transports=("shm", "tcp"), cluster_secret="correct horse battery staple")


def test_a_fetch_without_a_link_is_refused(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        call = transfer_pb2_grpc.TransferStub(await worker.host.channels.to(worker.host.address)).Fetch()
        await call.write(transfer_pb2.FetchRequest(ticket=transfer_pb2.FetchTicket(request_id="r")))
        assert (await call.code(), await call.details()) == (grpc.StatusCode.UNAVAILABLE, UNKNOWN_LINK)

    serving(test)


def test_links_are_tested_with_random_bytes_outside_the_pool(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        region, layout = worker.host.engine.region, worker.host.model.layout
        assert layout.pool_blocks == worker.host.info.kv_blocks_total == worker.host.status().kv_blocks_total == 96
        source = bytes(region.readable(layout.layers - 1, 1, layout.probe_source, 1))
        assert len(set(source)) > 64 and source != bytes(region.readable(0, 0, layout.probe_source, 1))

    serving(test)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cluster_secret": "short"}, "at least 16"),
        ({"cluster_secret_file": "/nowhere/secret"}, "cannot be read"),
        (
            {f"transport_tls_{name}": f"/nowhere/{name}" for name in ("certificate", "key", "authority")},
            "/nowhere/certificate cannot be read",
        ),
    ],
)
def test_a_secret_or_certificate_that_cannot_be_used_stops_the_start(
    llama: Path, redis_server: EmbeddedRedis, key_prefix: str, settings: dict[str, Any], sentence: str
) -> None:
    async def main() -> None:
        host = WorkerHost("decode", settings_of(llama, redis_server, key_prefix, **settings), lambda _: None)
        with pytest.raises(SettingsError, match=sentence):
            await host.load()
        await host.stop()

    asyncio.run(main())


def test_without_a_secret_it_warns_once(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    async def test(worker: Worker) -> None:
        assert worker.host.ports.transports

    with caplog.at_level(logging.WARNING):
        serving(test)
    assert sum("no cluster secret" in record.message for record in caplog.records) == 1


# ---- what operators ask


async def ask(worker: Worker, method: str, request: Any) -> Any:
    async with grpc.aio.insecure_channel(worker.host.address) as channel:
        return await getattr(worker_pb2_grpc.WorkerStub(channel), method)(request)


def test_it_says_what_its_cache_holds_and_was_good_for(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        shared = random_prompt(64)
        await worker.generate([shared])
        await worker.generate([shared + random_prompt(16, seed=1)])
        status = await ask(worker, "GetCacheStatus", worker_pb2.GetCacheStatusRequest(top_prefixes=5))
        cached, block_bytes = len(await worker.inventory()), worker.host.model.layout.block_bytes
        assert status.worker_id == worker.host.worker_id
        assert [tier.tier for tier in status.tiers] == [events_pb2.TIER_HBM]
        hbm = status.tiers[0]
        assert (hbm.blocks, hbm.bytes) == (cached, cached * block_bytes)
        assert (hbm.blocks_max, hbm.bytes_max) == (96, 96 * block_bytes)
        assert (hbm.hit_tokens, status.queried_tokens) == (64, 64 + 80)
        assert (status.fetched_tokens, status.corrupt_blocks, hbm.off_reason) == (0, 0, "")

    serving(test)


def test_its_cache_can_be_cleared(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        await worker.generate([random_prompt(64)])
        cached = len(await worker.inventory())
        answer = await ask(worker, "ClearCache", worker_pb2.ClearCacheRequest())
        assert (answer.blocks, answer.bytes) == (cached, cached * worker.host.model.layout.block_bytes)
        assert not await worker.inventory()
        async with asyncio.timeout(WAIT_S):
            while held(await worker.snapshot()):  # noqa: ASYNC110 - the engine tells it with its next step
                await asyncio.sleep(0.01)
        again = await ask(worker, "ClearCache", worker_pb2.ClearCacheRequest())
        assert (again.blocks, again.bytes) == (0, 0)

    serving(test)


def test_a_tenant_is_cleared_and_nobody_else(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        (blue,) = await worker.generate([random_prompt(64)], retention=Retention("blue"))
        (green,) = await worker.generate([random_prompt(64, seed=1)], retention=Retention("green"))
        await ask(worker, "ClearCache", worker_pb2.ClearCacheRequest(tenant="blue"))
        assert await worker.inventory() == names(worker, green) != names(worker, blue)

    serving(test)


def test_an_engine_that_is_gone_answers_unavailable(serving: Serving) -> None:
    async def test(worker: Worker) -> None:
        worker.host.engine.request_stop()
        for method, request in (
            ("GetCacheStatus", worker_pb2.GetCacheStatusRequest()),
            ("ClearCache", worker_pb2.ClearCacheRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(worker, method, request)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    serving(test)


# ---- how it ends


async def nothing_runs() -> None: ...


def test_it_drains_until_what_it_has_cached_lies_on_its_ssd(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SlotFile.write

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        write(*arguments)

    monkeypatch.setattr(SlotFile, "write", write_slowly)

    async def test(worker: Worker) -> None:
        everything = await worker.generate([random_prompt(100, seed=seed) for seed in range(4)])
        await worker.host.drain(nothing_runs)
        wanted = set().union(*(names(worker, tokens) for tokens in everything))
        _, ssd = await worker.host.engine.call(lambda engine: engine.tiers.states() if engine.tiers else ())
        assert (ssd.tier, ssd.blocks) == ("ssd", len(wanted))

    serving(test, ddr_bytes=2**24, ssd_dir=tmp_path, ssd_bytes=2**24)


def test_it_does_not_drain_for_ever(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TierStore, "is_settled", False)

    async def test(worker: Worker) -> None:
        await worker.host.drain(nothing_runs)

    with caplog.at_level(logging.WARNING):
        serving(test, ddr_bytes=2**24, ssd_dir=tmp_path, ssd_bytes=2**24, drain_timeout_s=0.1)
    assert any("still had work" in record.message for record in caplog.records)


# ---- what it shows


def test_its_tiers_are_shown(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_metrics, "PERIOD_S", 0.01)

    async def test(worker: Worker) -> None:
        await worker.generate([random_prompt(64)])
        cached = len(await worker.inventory())
        worker.host._take(StepResult(restored=(RestoreTiming("ddr", 10**6, 0.001),)))

        def shown(name: str, **labels: str) -> float | None:
            return worker.host.registry.get_sample_value(name, labels)

        async with asyncio.timeout(WAIT_S):
            while shown("baton_kv_tier_blocks", tier="hbm") != cached:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert shown("baton_kv_tier_capacity_bytes", tier="hbm") == 96 * worker.host.model.layout.block_bytes
        assert shown("baton_kv_tier_off", tier="hbm") == 0
        assert shown("baton_kv_tier_hits_tokens_total", tier="hbm") == 0
        assert shown("baton_kv_tier_restored_bytes_total", tier="ddr") == 10**6
        assert shown("baton_kv_tier_restore_seconds_total", tier="ddr") == 0.001
        assert shown("baton_recomputed_tokens_total") == shown("baton_kv_corrupt_blocks_total") == 0
        info = worker.host.info
        assert info.fetches and info.latency.restore.keys() == {"ddr"}
        assert info.latency.restore["ddr"].time_s(10**6) == pytest.approx(0.001)
        labels = {"role": "decode", "model": worker.host.model.name, "tier": "ddr"}
        assert shown("baton_latency_restore_bytes_per_second", **labels) == pytest.approx(1e9)

    serving(test)


# ---- the directory


@dataclass
class Heard:
    """By a worker's tiers, on the engine's thread."""

    pinned: list[tuple[set[BlockHash], float]] = field(default_factory=list)
    copies: list[tuple[BlockHash, int]] = field(default_factory=list)
    doubtful: list[BlockHash] = field(default_factory=list)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    monkeypatch.setattr(TierStore, "pin", lambda _, names, until_s: heard.pinned.append((set(names), until_s)))
    monkeypatch.setattr(TierStore, "note_copies", lambda _, copies: heard.copies.extend(copies))
    monkeypatch.setattr(TierStore, "doubtful", lambda _, count: heard.doubtful[:count])
    monkeypatch.setattr(cluster_cache, "ASK_PERIOD_S", 0.02)
    return heard


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 - of what happens in Redis and on the engine's thread nobody is told
            await asyncio.sleep(0.01)


def test_the_directory_names_what_it_has_and_its_tiers_hear_of_pins(
    serving: Serving,
    redis_server: EmbeddedRedis,
    key_prefix: str,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory, "ANSWER_TIMEOUT_S", WAIT_S)

    async def test(worker: Worker) -> None:
        (tokens,) = await worker.generate([random_prompt(64)])
        wanted = list(names(worker, tokens))
        redis = await connect_redis(redis_server.url)
        peer = Directory(redis, key_prefix, WorkerId("peer"), "e", dict)
        try:
            async with asyncio.timeout(WAIT_S):
                while not all(found := await peer.holders(wanted)) or not found:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert {(h.worker_id, h.tier) for of_name in found for h in of_name} == {(worker.host.worker_id, "hbm")}
            assert await peer.pin(wanted, worker.host.worker_id, 5.0) == ["hbm"] * len(wanted)
            before_s = monotonic()
            await until(lambda: bool(heard.pinned))
            names_pinned, until_s = heard.pinned[0]
            assert names_pinned == set(wanted) and before_s < until_s < before_s + 5 + WAIT_S
        finally:
            await redis.aclose()

    serving(test, ddr_bytes=2**22)


def test_it_asks_which_of_its_blocks_others_have_too(
    serving: Serving, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [BlockHash(bytes([number]) * NAME_BYTES) for number in range(3)]
    is_away = False

    async def copies(self: Directory, asked: Sequence[BlockHash]) -> list[int]:
        del self
        return [] if is_away else list(range(len(asked)))

    monkeypatch.setattr(Directory, "copies", copies)

    async def test(worker: Worker) -> None:
        nonlocal is_away
        heard.doubtful = some
        await until(lambda: heard.copies[:3] == list(zip(some, range(3), strict=True)))
        is_away = True
        told = len(heard.copies)
        assert (await worker.generate([random_prompt(20)]))[0]
        assert len(heard.copies) <= told + 3, "where Redis is away nothing is known"

    serving(test, ddr_bytes=2**22)
