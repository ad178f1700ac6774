"""What an engine's prefix cache gives to other workers, to one that asks, and from worker to worker for real."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
import torch
from prometheus_client import CollectorRegistry
from tiny_models import make_model, random_prompt, reference
from toy_engine import ToyEngine

from baton.clock import monotonic
from baton.errors import Unavailable
from baton.ids import RequestId
from baton.rpc import transfer_pb2_grpc
from baton.sampling import SamplingParams
from baton.settings import WorkerSettings
from engine.core import LocalEngine
from engine.interface import EngineRequest, Prefill, StepResult
from engine.model.loader import LoadedModel, load_model
from engine.opening import open_engine
from engine.runner import StepLogits
from engine.thread import EngineThread
from engine.worker.block_source import CachedBlocks
from engine.worker.transfer_servicer import TransferServicer
from engine.worker.transfers import Transfers, open_transfers
from kvcache.block_hash import block_hashes, root_hash
from kvtransfer.fetch.client import Fetcher
from kvtransfer.inproc import InprocHub

A = RequestId("a")
BLOCK_TOKENS = 8
PROMPT = random_prompt(5 * BLOCK_TOKENS, seed=3)
NEW_TOKENS = 10


# ---- one engine


def test_blocks_are_held_inside_and_let_go_outside() -> None:
    async def test() -> None:
        toy = ToyEngine()
        toy.add("a", range(1, 12))
        toy.run()
        thread = EngineThread(lambda: toy.engine, lambda result: None, asyncio.get_running_loop())  # noqa: ARG005
        await thread.started()
        names = block_hashes(root_hash("toy", 4, "float32"), range(1, 12), 4)
        try:
            async with CachedBlocks(thread).hold(names) as held:
                assert len(held.blocks) == 2
                assert list(held.digests) == toy.region.digests(held.blocks)
                assert thread.stats().kv_blocks_used == 2
            assert (await thread.call(lambda engine: engine.stats())).kv_blocks_used == 0
            with pytest.raises(ZeroDivisionError):
                async with CachedBlocks(thread).hold(names):
                    raise ZeroDivisionError
            assert (await thread.call(lambda engine: engine.stats())).kv_blocks_used == 0
        finally:
            await thread.stop()

    asyncio.run(test())


def test_who_is_cancelled_while_it_asks_holds_nothing() -> None:
    async def test() -> None:
        toy = ToyEngine()
        toy.add("a", range(1, 12))
        toy.run()
        thread = EngineThread(lambda: toy.engine, lambda result: None, asyncio.get_running_loop())  # noqa: ARG005
        await thread.started()
        names = block_hashes(root_hash("toy", 4, "float32"), range(1, 12), 4)

        async def ask() -> None:
            async with CachedBlocks(thread).hold(names):
                raise AssertionError("too late")

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled()
        async with asyncio.timeout(30):  # the hold comes, and what lets go of it behind it
            while (await thread.call(lambda engine: engine.stats())).kv_blocks_used:
                pass
        await thread.call(lambda engine: engine.check_integrity())
        await thread.stop()

    asyncio.run(test())


def test_an_engine_that_is_gone_has_no_blocks() -> None:
    async def test() -> None:
        thread = EngineThread(lambda: ToyEngine().engine, lambda result: None, asyncio.get_running_loop())  # noqa: ARG005
        await thread.started()
        await thread.stop()
        with pytest.raises(Unavailable):
            async with CachedBlocks(thread).hold([]):
                pass

    asyncio.run(test())


# ---- two workers


@dataclass
class Worker:
    thread: EngineThread[LocalEngine[StepLogits]]
    transfers: Transfers
    results: list[StepResult]
    changed: asyncio.Event
    address: str = ""
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    async def add(self, prefill: Prefill) -> None:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        await self.thread.call(lambda engine: engine.add(EngineRequest(A, PROMPT, params, prefill)))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    @property
    def tokens(self) -> list[int]:
        return [token for result in self.results for event in result.generated for token in event.token_ids]


@asynccontextmanager
async def worker(loaded: LoadedModel, worker_id: str, hub: InprocHub, transport: str) -> AsyncIterator[Worker]:
    settings = WorkerSettings(kv_blocks=64, block_tokens=BLOCK_TOKENS, chunk_tokens=32, transport=transport)
    results, changed = list[StepResult](), asyncio.Event()

    def take(result: StepResult) -> None:
        results.append(result)
        changed.set()

    thread = EngineThread(lambda: open_engine(loaded, settings), take, asyncio.get_running_loop())
    await thread.started()
    transfers = open_transfers(
        *(settings, b"secret", worker_id, thread, CollectorRegistry(), _ignore, _ignore, hub, monotonic)
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    servicer = TransferServicer(transfers.link_book, transfers.fetch_servicer)
    transfer_pb2_grpc.add_TransferServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield Worker(thread, transfers, results, changed, address)
    finally:
        await transfers.close_links()
        await server.stop(0)
        await transfers.close()
        stats = await thread.call(lambda engine: (engine.check_integrity(), engine.stats())[1])
        assert stats.kv_blocks_used == 0
        await thread.stop()


def _ignore(size_bytes: int, seconds: float) -> None:
    del size_bytes, seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("transport", ["inproc", "shm"])
def test_what_one_worker_computed_another_decodes_from(model: Path, transport: str) -> None:
    async def test() -> None:
        hub = InprocHub()
        async with worker(loaded, "w-0", hub, transport) as here, worker(loaded, "w-1", hub, transport) as there:
            await there.add(Prefill.HERE)
            await there.until(lambda: len(there.tokens) == NEW_TOKENS)
            assert there.tokens == expected
            await here.add(Prefill.ELSEWHERE)
            await here.until(lambda: any(result.admitted for result in here.results))
            reserved = here.results[0].admitted[0].blocks
            info, transfers = here.thread.model, here.transfers
            names = block_hashes(root_hash(info.fingerprint, BLOCK_TOKENS, info.layout.dtype), PROMPT, BLOCK_TOKENS)
            fetcher = Fetcher(
                transfers.links,
                transfers.ports,
                transfers.channels.to,
                transfers.verifier,
                info.fingerprint,
                info.layout,
            )
            await transfers.links.to(there.address)
            fetched = await fetcher.fetch(there.address, A, names, reserved, 10.0, asyncio.Event())
            assert (fetched.blocks, fetched.error) == (5, None)
            await here.thread.call(lambda engine: engine.commit(A, expected[0], (), fetched.digests))
            await here.until(lambda: len(here.tokens) == NEW_TOKENS)
            assert here.tokens == expected
            assert here.thread.stats().steps == NEW_TOKENS - 1, "none of them computed the prompt"
            held = await here.thread.call(lambda engine: engine.hold(names))
            assert held.digests == fetched.digests
            here.thread.post(lambda engine: engine.let_go(held))
            await fetcher.close()

    loaded = load_model(str(model), device="cpu", dtype="float32")
    expected = reference(model, PROMPT, NEW_TOKENS)
    asyncio.run(test())
