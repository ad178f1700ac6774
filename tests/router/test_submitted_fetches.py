"""What workers are told to fetch from each other: plans in what the router submits."""

import asyncio
from dataclasses import replace
from pathlib import Path

from fake_worker import STOP, FakeDecodeWorker, failure, is_silent, output, says
from generation_rig import REQUEST, TIMEOUT_S, ask, generating

from baton.cluster.worker_info import Load, WorkerInfo
from baton.ids import WorkerId
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from baton.rpc import worker_pb2
from router.placement.block_names import BlockKind, BlockNames
from router.retention import Retention

SLOW_TO_COMPUTE = WorkerLatency(
    PrefillCost(chunk_s=0.01, token_s=0.01, token_context_s=0.0),
    DecodeCost(step_s=0.001, sequence_s=1e-5, kv_token_s=1e-8),
    TransferCost(latency_s=0.001, bytes_per_s=1e9),
)
PROMPT = "x" * 400
HELD_BLOCKS = 20


class Fetching(FakeDecodeWorker):
    """Takes prefixes from others; `load` and `role` are what it says of itself."""

    load = Load()

    @property
    def info(self) -> WorkerInfo:
        changes = {"fetches": True, "kv_block_bytes": 16 * 1000, "latency": SLOW_TO_COMPUTE, "load": self.load}
        return super().info.model_copy(update=changes)


def busy(worker: Fetching) -> Fetching:
    worker.load = Load(waiting_tokens=50_000, running_sequences=40, kv_tokens=40_000)
    return worker


def a_prefill_worker(name: str, *, is_busy: bool = False) -> WorkerInfo:
    info = Fetching(is_silent, name).info
    load = Load(waiting_tokens=50_000) if is_busy else Load()
    return info.model_copy(update={"role": "prefill", "address": f"{name}:1", "load": load})


def names_of(prompt: str) -> BlockNames:
    return BlockNames([ord(character) % 400 for character in prompt])


KIND = BlockKind("of m", 16, "float32")


def test_a_decode_worker_that_computes_the_prompt_is_told_whom_to_fetch_from(model_directory: Path) -> None:
    async def main() -> None:
        done = says([output(97, finish=STOP)])
        holder, idle = busy(Fetching(done, "holder")), Fetching(done, "idle")
        async with generating(model_directory, holder, idle) as rig:
            rig.index.expect([WorkerId("holder")], names_of(PROMPT)(KIND)[:HELD_BLOCKS])
            await rig.run(ask(PROMPT))
            (submit,) = idle.submits
            plan = submit.fetch
            assert (plan.worker_id, plan.address) == ("holder", holder.info.address)
            assert (plan.blocks, plan.block_tokens) == (HELD_BLOCKS, 16)
            assert 0 < plan.fetch_s < plan.compute_s
            assert abs(plan.compute_s - HELD_BLOCKS * 16 * 0.01) < 0.05, "what computing the same tokens takes"
            assert rig.metric("baton_placement_fetches_total") == 1
            told = rig.decisions.get(REQUEST)
            assert told is not None
            chosen = told.placements[0].candidates[0]
            assert (chosen.cached_tokens_peer, chosen.fetch_from) == (HELD_BLOCKS * 16, "holder")

    asyncio.run(main())


def test_without_a_better_holder_there_is_no_plan(model_directory: Path) -> None:
    async def main() -> None:
        done = says([output(97, finish=STOP)])
        workers = [Fetching(done, "a"), Fetching(done, "b")]
        async with generating(model_directory, *workers) as rig:
            await rig.run(ask(PROMPT))
            (submit,) = [submit for worker in workers for submit in worker.submits]
            assert not submit.HasField("fetch")

    asyncio.run(main())


def test_prefill_workers_have_plans_of_their_own_and_the_decode_worker_none(model_directory: Path) -> None:
    async def main() -> None:
        decode = busy(Fetching(says([output(97, finish=STOP)]), "decode"))
        decode.load = decode.load.model_copy(update={"waiting_tokens": 0})  # others' streams would stall
        async with generating(model_directory, decode) as rig:
            prefill = [a_prefill_worker("p0", is_busy=True), a_prefill_worker("p1"), a_prefill_worker("p2")]
            rig.placer.set_workers([decode.info, *prefill])
            rig.index.expect([WorkerId("p0")], names_of(PROMPT)(KIND)[:HELD_BLOCKS])
            await rig.run(ask(PROMPT))
            (submit,) = decode.submits
            assert not submit.HasField("fetch"), "it computes nothing"
            plans = {one.worker_id: one for one in submit.prefill_candidates}
            assert set(plans) == {"p0", "p1", "p2"}
            assert not plans["p0"].HasField("fetch"), "it has it"
            for name in ("p1", "p2"):
                assert (plans[name].fetch.worker_id, plans[name].fetch.address) == ("p0", "p0:1")

    asyncio.run(main())


def test_a_worker_that_failed_the_request_is_not_asked_for_its_blocks(model_directory: Path) -> None:
    async def main() -> None:
        done = says([output(97, finish=STOP)])
        refuses = says([failure(worker_pb2.ERROR_KIND_UNAVAILABLE)])
        holder, idle = Fetching(refuses, "holder"), Fetching(done, "idle")
        async with generating(model_directory, holder, idle) as rig:
            rig.index.expect([WorkerId("holder")], names_of(PROMPT)(KIND)[:HELD_BLOCKS])
            async with asyncio.timeout(TIMEOUT_S):
                await rig.run(ask(PROMPT))
            assert len(holder.submits) == 1, "it was the first choice"
            (submit,) = idle.submits
            assert not submit.HasField("fetch")

    asyncio.run(main())


def test_every_submit_says_whose_blocks_they_are(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(says([output(97, finish=STOP)]))
        async with generating(model_directory, worker) as rig:
            await rig.run(replace(ask(), retention=Retention(60.0, True, "acme", 2**30)))
            retention = worker.submits[0].retention
            assert (retention.ttl_s, retention.pin) == (60.0, True)
            assert (retention.tenant, retention.quota_bytes) == ("acme", 2**30)

    asyncio.run(main())
