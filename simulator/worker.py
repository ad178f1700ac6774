"""Simulated workers: what prefill_worker and decode_worker do with an engine, in virtual time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from baton.cluster.cache_events import CacheChanges
from baton.cluster.worker_info import Load, Role, WorkerInfo
from baton.ids import WorkerId
from baton.latency import StepWork
from baton.latency_fit import LatencyFit
from engine.cache_journal import CacheJournal
from engine.interface import Prefill
from engine.scheduler import Limits, Scheduler
from engine.worker.arrival_rate import ArrivalRate
from kvcache.block_pool import BlockPool
from simulator.engine import EngineListener, SimulatedEngine
from simulator.job import Job
from simulator.profile import Profile, RoleProfile
from simulator.sequence import SimulatedSequence, begin_sequence
from simulator.trace import TRACE_BLOCK_TOKENS
from simulator.virtual_time import VirtualTime

MEASURE_PERIOD_S = 0.05
"""One step in so long is measured. A real worker measures every one, but its fit remembers no more than some thirty."""
EPOCH = "1"
"""Nobody restarts."""
NOISE = 0.02
"""Standard deviation of a measurement, relative."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all workers of one replay share."""

    time: VirtualTime
    profile: Profile
    random: Random
    publish: Callable[[WorkerId, CacheChanges], None]
    """A worker's KV events, at the instant they leave it."""


class SimulatedWorker:
    """A worker without its role: engine, cache events, latency fit and membership record."""

    def __init__(self, setup: Setup, worker_id: str, role: Role, slowdown: float, listener: EngineListener) -> None:
        profile, of_role = setup.profile, role_profile(setup.profile, role)
        self.worker_id, self.role, self.setup = WorkerId(worker_id), role, setup
        self._cache = CacheJournal()
        pool = BlockPool(of_role.kv_blocks, self._cache)
        limits = Limits(of_role.chunk_tokens, of_role.sequences_max, of_role.waiting_max)
        self.scheduler = Scheduler(pool, TRACE_BLOCK_TOKENS, limits)
        self.engine = SimulatedEngine(
            setup.time, self.scheduler, profile.latency, slowdown, listener, self._measured, self._publish
        )
        self.fit = LatencyFit(profile.latency)
        self._measured_s = -math.inf
        self._arrivals, self._arrival_rate = 0, ArrivalRate(setup.time)
        self._record = worker_record(profile, of_role, self.worker_id, role)

    def begin(self, job: Job, prefill: Prefill) -> SimulatedSequence:
        """Queues a request. Raises Overloaded."""
        request = job.request
        sequence = begin_sequence(
            job.number,
            job.names,
            request.prompt_tokens,
            request.output_tokens,
            prefill,
            self._arrivals,
            TRACE_BLOCK_TOKENS,
        )
        self._arrivals += 1
        self._arrival_rate.arrived()
        self.engine.add(sequence)
        return sequence

    def _measured(self, work: StepWork, seconds: float) -> None:
        if self.setup.time.now_s >= self._measured_s + MEASURE_PERIOD_S:
            self._measured_s = self.setup.time.now_s
            self.fit.observe_step(work, self.noisy(seconds))

    def noisy(self, seconds: float) -> float:
        return seconds * max(1 + NOISE * self.setup.random.gauss(0, 1), 0.1)

    def _publish(self) -> None:
        if changes := self._cache.take():
            self.setup.publish(self.worker_id, changes)

    @property
    def info(self) -> WorkerInfo:
        scheduler = self.scheduler
        load = Load(
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting) + len(scheduler.reserved),
            waiting_tokens=scheduler.waiting_tokens,
            waiting_token_context=scheduler.waiting_token_context,
            kv_blocks_used=scheduler.pool.used,
            kv_blocks_wanted=scheduler.kv_blocks_wanted,
            kv_blocks_cached=scheduler.pool.cached,
            kv_tokens=scheduler.kv_tokens,
            arrivals_per_s=self._arrival_rate.per_s,
        )
        return self._record.model_copy(update={"load": load, "latency": self.fit.latency})


def role_profile(profile: Profile, role: Role) -> RoleProfile:
    return profile.prefill if role == "prefill" else profile.decode


def worker_record(profile: Profile, of_role: RoleProfile, worker_id: WorkerId, role: Role) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        role=role,
        state="ready",
        address=f"{worker_id}:0",
        model=profile.model,
        fingerprint=profile.model,
        context_length=min(profile.context_length, of_role.kv_blocks * TRACE_BLOCK_TOKENS),
        vocabulary_size=1,
        block_tokens=TRACE_BLOCK_TOKENS,
        kv_dtype="bfloat16",
        kv_blocks_total=of_role.kv_blocks,
        kv_block_bytes=profile.kv_token_bytes * TRACE_BLOCK_TOKENS,
        layers=profile.layers,
        chunk_tokens=of_role.chunk_tokens,
        sequences_max=of_role.sequences_max,
        latency=profile.latency,
        epoch=EPOCH,
    )
