"""Workers that get the beginning of a prompt from another one: the same tokens, and never waiting for long."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockId
from baton.rpc import common_pb2, worker_pb2
from baton.sampling import SamplingParams
from baton.settings import PrefillWorkerSettings
from decode_worker.worker import DecodeWorker
from engine.core import LocalEngine
from engine.interface import EngineRequest, Retention
from engine.worker.speed import MeasuredSpeed
from kvtransfer.fetch import client
from kvtransfer.fetch.servicer import FetchServicer
from prefill_worker.worker import PrefillWorker
from tests.decode_worker.pair import BASE, Pair, running_pair, until
from tests.engine.tiny_models import make_model, random_prompt, reference

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1)
PROMPT = random_prompt(160, seed=160)
REUSABLE = 152
"""Tokens: all whole blocks that leave one to compute."""
RETENTION = common_pb2.CacheRetention(ttl_s=60.0, pin=True, tenant="blue", quota_bytes=4096)
SOON_S = 5.0
"""Half of what is waited for as long as half of what the workers believe that computing takes."""

Run = Callable[..., None]
Worker = PrefillWorker | DecodeWorker


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def with_pair(llama: Path, redis_server: EmbeddedRedis, key_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of workers whose computing takes so long, as they believe, that anything is worth a fetch. The decode worker's
    pool is small."""
    monkeypatch.setattr(MeasuredSpeed, "compute_s", lambda self, new, cached: 20.0)  # noqa: ARG005

    def run(test: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
        async def main() -> None:
            options = {"prefill": {"kv_blocks": 200}, "kv_blocks": 100, "verify": "always", **settings}
            async with running_pair(llama, redis_server.url, key_prefix, **options) as pair:
                await test(pair)

        asyncio.run(main())

    return run


@asynccontextmanager
async def another_prefill_worker(pair: Pair, **changes: Any) -> AsyncIterator[PrefillWorker]:
    settings = pair.prefill._settings
    common = {key: getattr(settings, key) for key in ("model", "redis_url", "key_prefix", "verify")}
    worker = PrefillWorker(PrefillWorkerSettings(**{**BASE, **common, **changes}))
    try:
        await worker.start()
        yield worker
    finally:
        await worker.stop()


@asynccontextmanager
async def silent_peer() -> AsyncIterator[str]:
    """Accepts, and never says anything."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield "127.0.0.1:%d" % server.sockets[0].getsockname()[1]  # noqa: UP031 - shorter
    finally:
        server.close()
        for writer in writers:
            writer.close()


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker answers when it is asked for blocks, nor when it is told that nobody wants them any more."""

    async def say_nothing(self: FetchServicer, context: object) -> None:
        del self, context
        await asyncio.Event().wait()

    monkeypatch.setattr(FetchServicer, "serve", say_nothing)
    monkeypatch.setattr(client, "RELEASE_TIMEOUT_S", 0.3)


async def link(worker: Worker, peer: Worker) -> None:
    """Without which nothing is fetched: nobody waits for it."""
    await worker._host.links.to(peer.address)


def plan(peer: str, worker_id: str = "peer", compute_s: float = 10.0, blocks: int = 20) -> common_pb2.FetchPlan:
    return common_pb2.FetchPlan(
        worker_id=worker_id, address=peer, blocks=blocks, block_tokens=8, fetch_s=0.001, compute_s=compute_s
    )


def plan_of(worker: Worker, **fields: Any) -> common_pb2.FetchPlan:
    return plan(worker.address, worker.info.worker_id, **fields)


def candidate(worker: PrefillWorker, fetch: common_pb2.FetchPlan) -> worker_pb2.PrefillCandidate:
    return worker_pb2.PrefillCandidate(worker_id=worker.info.worker_id, address=worker.address, fetch=fetch)


async def warm_prefill_worker(pair: Pair) -> None:
    """The prompt lies in the prefill worker's cache alone; there is a link to it."""
    await pair.ask(PROMPT, GREEDY)
    for seed in range(100, 106):
        await pair.stream.ask(random_prompt(330, seed=seed), ONE)


def sample(worker: Worker, name: str, **labels: str) -> float | None:
    return worker._host.registry.get_sample_value(name, labels)


# ---- what comes


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
def test_a_decode_worker_gets_a_prefix_from_its_peer(transport: str, llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await warm_prefill_worker(pair)
        answer = await pair.stream.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill))
        assert answer.token_ids == reference(llama, PROMPT, 12)
        timeline = answer.timeline
        assert (timeline.fetched_tokens, timeline.cached_tokens, answer.cached_tokens) == (REUSABLE,) * 3
        assert 0 < timeline.fetch_s < 10 and timeline.queue_s < timeline.first_token_s
        assert timeline.prefill_worker == "" and timeline.restored_tokens == 0
        assert sample(pair.decode, "baton_kv_fetches_total", outcome="complete") == 1
        again = await pair.stream.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill))
        assert again.token_ids == answer.token_ids
        assert (again.timeline.fetched_tokens, again.timeline.cached_tokens) == (0, REUSABLE), "it has them now"

    with_pair(test, transports=(transport,))


def test_only_what_is_lacking_is_fetched_and_the_rest_is_computed(llama: Path, with_pair: Run) -> None:
    longer = PROMPT[:96] + random_prompt(64, seed=7)

    async def test(pair: Pair) -> None:
        await warm_prefill_worker(pair)
        await pair.stream.ask(PROMPT[:50], ONE)
        answer = await pair.stream.ask(longer, GREEDY, fetch=plan_of(pair.prefill))
        assert answer.token_ids == reference(llama, longer, 12)
        assert (answer.timeline.fetched_tokens, answer.timeline.cached_tokens) == (96 - 48, 96)
        assert sample(pair.decode, "baton_kv_fetches_total", outcome="partial") == 1

    with_pair(test)


def test_a_prefill_worker_gets_a_prefix_from_its_peer(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await warm_prefill_worker(pair)
        async with another_prefill_worker(pair) as second:
            await link(second, pair.prefill)
            chosen = candidate(second, plan_of(pair.prefill))
            answer = await pair.stream.ask(PROMPT, GREEDY, [chosen])
            assert answer.token_ids == reference(llama, PROMPT, 12)
            timeline = answer.timeline
            assert timeline.prefill_worker == second.info.worker_id
            assert (timeline.fetched_tokens, timeline.prefill_cached_tokens) == (REUSABLE, REUSABLE)
            assert timeline.fetch_s > 0 and timeline.cached_tokens == 0

    with_pair(test)


def test_a_plan_for_a_prefill_elsewhere_is_not_the_decode_workers(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await warm_prefill_worker(pair)
        answer = await pair.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill))
        assert answer.token_ids == reference(llama, PROMPT, 12)
        assert answer.timeline.fetched_tokens == 0 and answer.timeline.prefill_cached_tokens == REUSABLE

    with_pair(test)


# ---- what does not


def test_a_corrupt_block_and_what_follows_it_is_computed(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await warm_prefill_worker(pair)
        await pair.prefill._host.engine.call(spoil)
        answer = await pair.stream.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill))
        assert answer.token_ids == reference(llama, PROMPT, 12)
        assert answer.timeline.fetched_tokens == answer.timeline.cached_tokens == 5 * 8
        assert sample(pair.decode, "baton_kv_fetches_total", outcome="failed") == 1

    def spoil(engine: LocalEngine[Any]) -> None:
        """Of the prompt's blocks the sixth; the digests are those of what was there."""
        pool = engine._scheduler.pool
        block = list(pool._by_name.values())[5]
        region = engine.region
        region.writable(1, 0, BlockId(block), 1)[:4] = b"\xff\xff\xff\xff"  # type: ignore[attr-defined]

    with_pair(test)


@pytest.mark.usefixtures("silence")
def test_a_peer_that_says_nothing_is_waited_for_half_as_long_as_computing_takes(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await link(pair.decode, pair.prefill)
        await link(pair.prefill, pair.decode)
        alone = await pair.stream.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill, compute_s=0.2))
        longer = PROMPT + random_prompt(100, seed=9)
        chosen = candidate(pair.prefill, plan_of(pair.decode, compute_s=0.2))
        apart = await pair.stream.ask(longer, GREEDY, [chosen])
        for answer, prompt in ((alone, PROMPT), (apart, longer)):
            assert answer.token_ids == reference(llama, prompt, 12)
            assert answer.timeline.fetched_tokens == 0
            assert 0.07 < answer.timeline.fetch_s < 0.1 + SOON_S
        assert apart.timeline.prefill_worker

    with_pair(test)


def test_a_link_is_not_waited_for_but_made_for_the_next_request(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        async with silent_peer() as nobody:
            await pair.stream.ask(random_prompt(90, seed=90), ONE)  # what comes first takes longer
            answer = await pair.stream.ask(PROMPT, GREEDY, fetch=plan(nobody))
            assert answer.token_ids == reference(llama, PROMPT, 12)
            assert answer.timeline.fetched_tokens == 0 and answer.timeline.fetch_s < 1.0, "nor half of the plan's time"
            assert sample(pair.decode, "baton_kv_fetches_total", outcome="no_link") == 1

    with_pair(test)


def test_the_link_that_one_request_began_is_the_next_ones(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await warm_prefill_worker(pair)
        async with another_prefill_worker(pair) as second:
            other = random_prompt(160, seed=5)
            await pair.stream.ask(other, ONE, [candidate(second, plan_of(pair.prefill))])
            assert sample(second, "baton_kv_fetches_total", outcome="no_link") == 1
            await until(lambda: second._host.links.present(pair.prefill.address) is not None)
            answer = await pair.stream.ask(PROMPT, GREEDY, [candidate(second, plan_of(pair.prefill))])
            assert answer.token_ids == reference(llama, PROMPT, 12)
            assert answer.timeline.fetched_tokens == REUSABLE

    with_pair(test)


def test_nobody_home_and_fetching_turned_off(llama: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        for peer in (plan("127.0.0.1:1"), plan_of(pair.decode), plan_of(pair.prefill, blocks=0)):
            answer = await pair.stream.ask(PROMPT, GREEDY, fetch=peer)
            assert answer.token_ids == reference(llama, PROMPT, 12)
            assert answer.timeline.fetched_tokens == 0

    with_pair(test)
    with_pair(test, fetch=False)


# ---- whoever is not there any more


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_request_that_is_cancelled_while_it_fetches_leaves_nothing_behind(role: str, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        worker: Worker = pair.decode if role == "decode" else pair.prefill
        if role == "decode":
            await link(pair.decode, pair.prefill)
            request_id = await pair.stream.submit(PROMPT, GREEDY, fetch=plan_of(pair.prefill))
        else:
            await link(pair.prefill, pair.decode)
            request_id = await pair.stream.submit(PROMPT, GREEDY, [candidate(pair.prefill, plan_of(pair.decode))])
        await until_fetching(worker)
        await pair.stream.cancel(request_id)
        await pair.until_idle()
        await worker.drain()

    with_pair(test)


@pytest.mark.usefixtures("silence")
def test_a_request_that_expires_while_it_fetches_is_told_so(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        await link(pair.decode, pair.prefill)
        answer = await pair.stream.ask(PROMPT, GREEDY, fetch=plan_of(pair.prefill), deadline_s=0.3)
        assert "0.3 s" in answer.error and not answer.token_ids

    with_pair(test)


async def until_fetching(worker: Worker) -> None:
    async with asyncio.timeout(30):
        while not worker._host.prefetcher._running:  # noqa: ASYNC110 - the worker tells nobody
            await asyncio.sleep(0.005)


# ---- what is promised


def test_both_workers_are_told_how_long_to_keep_it(with_pair: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Retention] = {}
    add = LocalEngine.add

    def spy(self: LocalEngine[Any], request: EngineRequest) -> None:
        told[request.prefill.value] = request.retention
        add(self, request)

    monkeypatch.setattr(LocalEngine, "add", spy)

    async def test(pair: Pair) -> None:
        await pair.ask(PROMPT, ONE, retention=RETENTION)
        assert told == dict.fromkeys(("elsewhere", "only"), Retention("blue", 60.0, True, 4096))
        told.clear()
        await pair.stream.ask(random_prompt(20), ONE)
        assert told == {"here": Retention()}

    with_pair(test)
