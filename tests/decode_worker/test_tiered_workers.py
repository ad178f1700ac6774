"""Workers with memory and disk below their pools: the same tokens from every tier, on both workers and between them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from baton.cluster.cache_events import unpack
from baton.cluster.redis_client import connect_redis
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId
from baton.rpc import common_pb2, events_pb2, worker_pb2, worker_pb2_grpc
from baton.sampling import SamplingParams
from decode_worker.worker import DecodeWorker
from engine.core import LocalEngine
from engine.sequence import root_of
from engine.worker.speed import MeasuredSpeed
from kvcache.block_hash import block_hashes
from kvcache.directory.directory import Directory
from prefill_worker.worker import PrefillWorker
from tests.decode_worker.pair import Answer, Pair, running_pair, until
from tests.engine.tiny_models import make_model, random_prompt, reference

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1)
PROMPT = random_prompt(160, seed=160)
REUSABLE = 152
DDR_BYTES = 64 * 2**20
SSD_BYTES = 64 * 2**20
pytestmark = pytest.mark.usefixtures("patient_restores")
Run = Callable[..., None]
Worker = PrefillWorker | DecodeWorker


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def with_pair(llama: Path, redis_server: EmbeddedRedis, key_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(MeasuredSpeed, "compute_s", lambda self, new, cached: 20.0)  # noqa: ARG005

    def run(test: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
        async def main() -> None:
            options = {"kv_blocks": 100, "verify": "always", **settings}
            async with running_pair(llama, redis_server.url, key_prefix, **options) as pair:
                await test(pair)

        asyncio.run(main())

    return run


async def evict_from_decode(pair: Pair) -> None:
    for seed in range(100, 105):
        await pair.stream.ask(random_prompt(330, seed=seed), ONE)


async def evict_from_prefill(pair: Pair) -> None:
    for seed in range(200, 205):
        await pair.ask(random_prompt(330, seed=seed), ONE)


async def places(worker: Worker) -> set[str | None]:
    """Where the prompt's reusable blocks lie on a worker: in the highest tier."""

    def look(engine: LocalEngine[Any]) -> set[str | None]:
        names = block_hashes(root_of(engine.model, ""), PROMPT[:-1], engine.model.layout.block_tokens)
        return {engine.tiers.tier_of(name) if engine.tiers else None for name in names}

    return await worker._host.engine.call(look)


def plan_of(worker: Worker) -> common_pb2.FetchPlan:
    return common_pb2.FetchPlan(
        worker_id=worker.info.worker_id,
        address=worker.address,
        blocks=20,
        block_tokens=8,
        fetch_s=0.001,
        compute_s=10.0,
    )


def test_a_decode_worker_restores_what_left_its_pool(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        cold = await pair.stream.ask(PROMPT, GREEDY)
        await evict_from_decode(pair)
        assert await places(pair.decode) == {"ddr"}
        warm = await pair.stream.ask(PROMPT, GREEDY)
        assert warm.token_ids == cold.token_ids == reference(llama, PROMPT, 12)
        assert (warm.timeline.cached_tokens, warm.timeline.restored_tokens) == (REUSABLE, REUSABLE)
        assert warm.timeline.restore_s > 0
        ddr = pair.decode.info.latency.restore["ddr"]
        assert ddr.bytes_per_s > 0 and pair.decode.info.latency.restore.keys() == {"ddr"}
        await told_of(pair.decode)

    async def told_of(worker: Worker) -> None:
        """What operators and Prometheus see of it."""
        block_bytes, samples = worker.info.kv_block_bytes, worker._host.registry.get_sample_value

        def stored() -> float | None:
            return samples("baton_kv_tier_stored_bytes_total", {"tier": "ddr"})

        async with grpc.aio.insecure_channel(worker.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            status = await stub.GetCacheStatus(worker_pb2.GetCacheStatusRequest(top_prefixes=3))
            hbm, ddr = status.tiers
            assert (hbm.tier, ddr.tier) == (events_pb2.TIER_HBM, events_pb2.TIER_DDR)
            assert (hbm.hit_tokens, ddr.hit_tokens) == (0, REUSABLE)
            assert ddr.bytes == ddr.blocks * block_bytes and 19 < ddr.blocks < ddr.blocks_max
            assert ddr.restore_bytes_per_s > 0 and not ddr.off_reason
            top = status.top_prefixes[0]
            assert top.tokens >= REUSABLE and top.uses >= 1, (
                "the last block was computed again, which is a use of it too"
            )
            await until(lambda: (stored() or 0) > 19 * block_bytes)
            assert samples("baton_kv_tier_restored_bytes_total", {"tier": "ddr"}) == 19 * block_bytes
            cleared = await stub.ClearCache(worker_pb2.ClearCacheRequest())
            assert cleared.blocks > 100 and cleared.bytes == cleared.blocks * block_bytes
            status = await stub.GetCacheStatus(worker_pb2.GetCacheStatusRequest())
            assert [tier.blocks for tier in status.tiers] == [0, 0]

    with_pair(test, ddr_bytes=DDR_BYTES)


def test_what_the_decode_worker_restores_is_not_asked_of_the_prefill_worker(llama: Path, with_pair: Run) -> None:
    longer = PROMPT + random_prompt(160, seed=5)

    async def test(pair: Pair) -> None:
        await pair.stream.ask(PROMPT, ONE)
        await evict_from_decode(pair)
        answer = await pair.ask(longer, GREEDY)
        assert answer.token_ids == reference(llama, longer, 12)
        timeline = answer.timeline
        assert timeline.prefill_worker and timeline.cached_tokens == 160
        assert timeline.transfer_bytes == 20 * pair.decode.info.kv_block_bytes
        assert timeline.restored_tokens == 0, "on the worker that computed the prompt"

    with_pair(test, ddr_bytes=DDR_BYTES)


@pytest.mark.parametrize(("block_tokens", "reusable"), [(8, REUSABLE), (16, 144)])
def test_a_prefill_worker_restores_and_sends_it(block_tokens: int, reusable: int, llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await pair.ask(PROMPT, GREEDY)
        await evict_from_prefill(pair)
        assert await places(pair.prefill) == {"ddr"}
        await evict_from_decode(pair)
        warm = await pair.ask(PROMPT, GREEDY)
        assert warm.token_ids == reference(llama, PROMPT, 12)
        timeline = warm.timeline
        assert (timeline.cached_tokens, timeline.prefill_cached_tokens) == (0, reusable)
        assert timeline.restored_tokens == reusable and timeline.restore_s > 0
        assert timeline.transfer_bytes == 20 * pair.decode.info.kv_block_bytes

    blocks = 100 * 8 // block_tokens
    with_pair(test, prefill={"ddr_bytes": DDR_BYTES, "block_tokens": block_tokens, "kv_blocks": blocks})


def test_a_peers_blocks_are_brought_up_from_its_memory_to_be_fetched(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await pair.ask(PROMPT, GREEDY)
        await evict_from_prefill(pair)
        await evict_from_decode(pair)
        assert await places(pair.prefill) == {"ddr"}
        await pair.decode._host.links.to(pair.prefill.address)
        answers = await asyncio.gather(
            *(pair.stream.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill)) for _ in range(3))
        )
        for answer in answers:
            assert answer.token_ids == reference(llama, PROMPT, 12)
        assert [answer.timeline.fetched_tokens for answer in answers] == [REUSABLE] * 3
        assert pair.decode._host.prefetcher.fetched_tokens == REUSABLE, "by one fetch for all of them"
        assert await places(pair.prefill) == {"hbm"}

    with_pair(test, prefill={"ddr_bytes": DDR_BYTES})


def test_a_worker_begun_again_on_the_same_file_has_what_it_had(
    llama: Path, redis_server: EmbeddedRedis, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MeasuredSpeed, "compute_s", lambda self, new, cached: 20.0)  # noqa: ARG005
    options: dict[str, Any] = {"ddr_bytes": 2**19, "ssd_dir": tmp_path, "ssd_bytes": SSD_BYTES, "kv_blocks": 100}
    prefill = {"ddr_bytes": 0, "ssd_dir": None, "ssd_bytes": 0}

    prompts = [random_prompt(200, seed=seed) for seed in range(300, 330)]

    async def ask_all(pair: Pair) -> list[Answer]:
        return [await pair.stream.ask(prompt, GREEDY) for prompt in prompts]

    async def first() -> list[list[int]]:
        async with running_pair(llama, redis_server.url, key_prefix, prefill, **options) as pair:
            return [answer.token_ids for answer in await ask_all(pair)]

    async def second() -> list[Answer]:
        async with running_pair(llama, redis_server.url, key_prefix, prefill, **options) as pair:
            host = pair.decode._host
            await until(lambda: bool(on_ssd(host.cache_snapshot())))
            found = on_ssd(host.cache_snapshot())
            redis = await connect_redis(redis_server.url)
            try:
                directory = Directory(redis, key_prefix, WorkerId("someone"), "e", dict)
                while not all(await directory.holders(found[:100])):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            finally:
                await redis.aclose()
            return await ask_all(pair)

    expected = asyncio.run(first())
    answers = asyncio.run(second())
    assert [answer.token_ids for answer in answers] == expected
    assert sum(answer.timeline.restored_tokens for answer in answers) > 0


def on_ssd(messages: Iterable[worker_pb2.CacheSnapshot]) -> list[BlockHash]:
    sets = (blocks for message in messages for blocks in message.blocks)
    return [name for blocks in sets if blocks.tier == events_pb2.TIER_SSD for name in unpack(blocks.block_hashes)]
