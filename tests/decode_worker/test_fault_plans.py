"""A thousand seeded plans of what may go wrong with a request's blocks: no wrong token, no leaked block, and an end."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.sampling import SamplingParams
from decode_worker import fence, prefill_client
from kvtransfer.registry import BUILT_IN
from prefill_worker import job
from tests.decode_worker.faulty_cluster import FaultyCluster, faulty_cluster
from tests.engine.tiny_models import make_model, random_prompt, reference
from tests.kvtransfer.faulty import TRANSPORT, FaultPlan, Faults

PLANS = 1000
GROUPS = 20
"""Of plans that share a cluster, in each of which one worker is killed."""
KINDS_MIN = 7
"""Kinds of fault that come to pass in each group: nearly always all ten."""
AT_ONCE = 16
REQUEST_S_MAX = 100.0
GROUP_S_MAX = 250.0
PROMPTS = [random_prompt(length, seed=length) for length in (20, 31, 40, 52, 64, 75)]
TOKENS_MAX = 4
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS_MAX, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request, and what befalls it."""

    faults: FaultPlan
    prompt: int
    decode: int
    """Index of the decode worker that gets it."""
    candidates: tuple[int, ...]
    """Indices of prefill workers, in order."""
    is_cached: bool
    """Whether it shares its prefix cache with others of its prompt."""
    cancelled_at: int | None
    """The write or fence at which the caller loses interest."""

    @classmethod
    def of(cls, seed: int) -> "RequestPlan":
        rng = Random(f"request {seed}")
        return cls(
            faults=FaultPlan.of(seed),
            prompt=rng.randrange(len(PROMPTS)),
            decode=rng.randrange(2),
            candidates=tuple(rng.choices((0, 1), k=rng.randint(1, 3))),
            is_cached=rng.random() < 0.2,
            cancelled_at=rng.randrange(12) if rng.random() < 0.1 else None,
        )


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Which worker of the cluster is killed, and by whose write or fence."""

    killed: int
    by: int
    at: int

    @classmethod
    def of(cls, group: int, seeds: range) -> "GroupPlan":
        rng = Random(f"group {group}")
        return cls(rng.randrange(4), rng.choice(seeds), rng.randrange(8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("fault-plans"))


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Bounds are short, so that what is stuck is left soon; they are not what is tested."""
    monkeypatch.setattr(job, "STALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(prefill_client, "RELEASE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(fence, "SETTLE_TIMEOUT_S", 0.1)
    faults = Faults()
    monkeypatch.setitem(BUILT_IN, TRANSPORT, faults.transport)
    return faults


@pytest.mark.parametrize("group", range(GROUPS))
def test_whatever_happens_to_the_blocks_the_answers_are_right(
    group: int, model: Path, faults: Faults, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    seeds = range(group * PLANS // GROUPS, (group + 1) * PLANS // GROUPS)

    async def scenario() -> None:
        async with (
            asyncio.timeout(GROUP_S_MAX),
            faulty_cluster(model, redis_server.url, key_prefix, faults) as cluster,
        ):
            killing = asyncio.create_task(kill_one(cluster, GroupPlan.of(group, seeds)))
            turns = asyncio.Semaphore(AT_ONCE)
            outcomes = await asyncio.gather(*(survive(cluster, seed, turns, model) for seed in seeds))
            if not cluster.killed:
                killing.cancel()
            await asyncio.wait({killing})
            failures = [outcome for outcome in outcomes if outcome]
            assert not failures, "\n".join(failures)
            assert len(faults.happened) >= KINDS_MIN
            await cluster.check_idle()

    asyncio.run(scenario())


async def kill_one(cluster: FaultyCluster, plan: GroupPlan) -> None:
    """While the others are in the middle of theirs; not at all, if the transfer that does it does not get so far."""
    reached = asyncio.Event()
    injector = cluster.faults.plan(f"plan-{plan.by}", FaultPlan.of(plan.by))
    injector.on_operation = lambda number: number == plan.at and reached.set()
    await reached.wait()
    await cluster.kill(cluster.workers[plan.killed])


async def survive(cluster: FaultyCluster, seed: int, turns: asyncio.Semaphore, model: Path) -> str:
    """What went wrong, with what is needed to see it again; nothing, if all was right."""
    plan = RequestPlan.of(seed)
    try:
        async with turns, asyncio.timeout(REQUEST_S_MAX):
            await live_through(cluster, f"plan-{seed}", plan, model)
    except (AssertionError, TimeoutError) as error:
        return f"seed {seed}: {type(error).__name__} {error}: {plan}"
    return ""


async def live_through(cluster: FaultyCluster, request_id: str, plan: RequestPlan, model: Path) -> None:
    injector = cluster.faults.injectors.get(request_id) or cluster.faults.plan(request_id, plan.faults)
    asking = asyncio.ensure_future(
        cluster.ask(
            plan.decode,
            request_id,
            PROMPTS[plan.prompt],
            GREEDY,
            candidates=[cluster.prefill[index].address for index in plan.candidates],
            cache_salt="" if plan.is_cached else request_id,
        )
    )
    if plan.cancelled_at is not None and injector.on_operation is None:
        cancelled = asyncio.Event()
        injector.on_operation = lambda number: number == plan.cancelled_at and cancelled.set()
        losing_interest = asyncio.ensure_future(cancelled.wait())
        await asyncio.wait({asking, losing_interest}, return_when=asyncio.FIRST_COMPLETED)
        losing_interest.cancel()
        if not asking.done():
            asking.cancel()
            await asyncio.wait({asking})
            await cluster.cancel(request_id)
            return
    assert await asking == reference(model, PROMPTS[plan.prompt], TOKENS_MAX)
