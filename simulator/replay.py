"""Replays a trace through a simulated cluster, once for each policy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from baton.errors import SettingsError
from baton.ids import BlockHash
from baton.settings import Policy
from router.index.prefix_index import PrefixIndex
from router.placement.placer import Placer
from simulator.decode import SimulatedDecodeWorker
from simulator.job import Job
from simulator.line import Admission
from simulator.prefill import SimulatedPrefillWorker
from simulator.profile import Profile
from simulator.report import Report, report
from simulator.router import SimulatedRouter
from simulator.tiers.worker_tiers import TierSizes
from simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest, prompt_block_name
from simulator.virtual_time import VirtualTime
from simulator.worker import Setup

INDEX_BLOCKS_MAX = 4_000_000
"""As RouterSettings.index_blocks_max."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is replayed, whatever the policy."""

    profile: Profile
    prefill: int
    decode: int
    seed: int = 0
    slowdown: Mapping[str, float] = field(default_factory=dict)
    """By worker (prefill-0, decode-3): how many times as long everything takes that it computes."""
    admission: Admission | None = None
    tiers: TierSizes | None = None
    """Below the HBM of each worker; None: there are none."""

    def __post_init__(self) -> None:
        if self.prefill < 0 or self.decode < 1:
            raise SettingsError("A cluster needs at least one decode worker.")
        names = {*worker_names("prefill", self.prefill), *worker_names("decode", self.decode)}
        if unknown := sorted(self.slowdown.keys() - names):
            raise SettingsError(f"There is no worker {unknown[0]} to slow down; there are {', '.join(sorted(names))}.")
        if any(factor <= 0 for factor in self.slowdown.values()):
            raise SettingsError("A worker is slowed by a positive factor.")
        if self.tiers is not None:
            self.tiers.slots(self.profile)


def worker_names(role: str, count: int) -> list[str]:
    return [f"{role}-{number}" for number in range(count)]


class Replay:
    """One run of one policy. The same scenario, trace and policy give the same result."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        scenario: Scenario,
        policy: Policy,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """`progress` is told how many requests have left."""
        profile, time = scenario.profile, VirtualTime()
        index = PrefixIndex(INDEX_BLOCKS_MAX, time)
        placer = Placer(index, policy, time, Random(scenario.seed))
        self.router = SimulatedRouter(
            time, profile, index, placer, scenario.admission, len(trace), progress or _tell_nobody
        )
        setup = Setup(time, profile, Random(scenario.seed + 1), self.router.cache_changed, scenario.tiers)

        def slowdown(worker_id: str) -> float:
            return scenario.slowdown.get(worker_id, 1.0)

        self.prefill = [
            SimulatedPrefillWorker(setup, name, slowdown(name)) for name in worker_names("prefill", scenario.prefill)
        ]
        self.decode = [
            SimulatedDecodeWorker(setup, name, slowdown(name), self.router)
            for name in worker_names("decode", scenario.decode)
        ]
        self.router.join(self.prefill, self.decode)
        self._policy, self._time = policy, time
        self.jobs = [Job(number, request, _names(request)) for number, request in enumerate(trace)]

    def run(self) -> Report:
        for job in self.jobs:
            self._time.at(job.request.arrival_s, lambda job=job: self.router.arrive(job))  # type: ignore[misc]
        self._time.run()
        return report(self._policy, self.jobs, self.prefill, self.decode)


def _names(request: TraceRequest) -> Sequence[BlockHash]:
    return [prompt_block_name(block) for block in request.block_ids[: request.prompt_tokens // TRACE_BLOCK_TOKENS]]


def _tell_nobody(left: int) -> None:
    del left
