"""Simulated workers: what prefill_worker and decode_worker do with an engine, in virtual time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from baton.cluster.cache_events import CacheChanges
from baton.cluster.worker_info import Load, Role, WorkerInfo
from baton.ids import WorkerId
from baton.latency import StepWork, WorkerLatency
from baton.latency_fit import LatencyFit
from engine.cache_journal import CacheJournal
from engine.interface import Prefill
from engine.prefix_cache import PrefixCache
from engine.scheduler import Limits, Scheduler
from engine.tier_pump import TierPump
from engine.worker.arrival_rate import ArrivalRate
from kvcache.block_pool import BlockPool
from kvcache.restore_plan import RestoreCosts
from kvcache.tiers.interface import RestoreTiming
from simulator.engine import EngineListener, SimulatedEngine
from simulator.job import Job
from simulator.profile import Profile, RoleProfile
from simulator.restores import NothingBelow
from simulator.sequence import SimulatedSequence, begin_sequence
from simulator.tiers.worker_tiers import TierSizes, WorkerTiers, block_bytes_of, latency_with_tiers
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
    tiers: TierSizes | None = None
    """Below each worker's HBM."""


class SimulatedWorker:
    """A worker without its role: engine, cache events, latency fit and membership record."""

    def __init__(self, setup: Setup, worker_id: str, role: Role, slowdown: float, listener: EngineListener) -> None:
        profile, of_role = setup.profile, role_profile(setup.profile, role)
        self.worker_id, self.role, self.setup = WorkerId(worker_id), role, setup
        latency = latency_with_tiers(profile, setup.tiers)
        self.fit = LatencyFit(latency)
        self._of_role = of_role
        self._costs: RestoreCosts | None = None
        """As known by now; None: to be worked out anew."""
        self.tiers = self._make_tiers()
        self.scheduler, self._pump = self._make_scheduler()
        self.engine = SimulatedEngine(
            setup.time,
            self.scheduler,
            profile.latency,
            slowdown,
            listener,
            self._measured,
            self._publish,
            below=self if self.tiers else NothingBelow(),
        )
        self._pump.on_wake(self.engine.wake_below)
        if self.tiers:
            self.tiers.layer_landed = self.engine.look
        self._measured_s = -math.inf
        self._arrivals, self._arrival_rate = 0, ArrivalRate(setup.time)
        self._record = worker_record(profile, of_role, self.worker_id, role, latency)

    def _make_tiers(self) -> WorkerTiers | None:
        setup = self.setup
        if setup.tiers is None:
            return None
        seed = setup.random.getrandbits(64)
        return WorkerTiers(setup.time, setup.tiers, setup.profile, self._of_role.kv_blocks, self.costs, seed)

    def _make_scheduler(self) -> tuple[Scheduler, TierPump]:
        of_role, store, journal = self._of_role, (self.tiers.store if self.tiers else None), CacheJournal()
        pool = BlockPool(of_role.kv_blocks, *([store] if store else []), journal)
        cache = PrefixCache(pool, TRACE_BLOCK_TOKENS, store, self.costs, self.setup.profile.layers, self.setup.time)
        limits = Limits(of_role.chunk_tokens, of_role.sequences_max, of_role.waiting_max)
        return Scheduler(pool, TRACE_BLOCK_TOKENS, limits, cache), TierPump(store, pool, journal)

    def costs(self) -> RestoreCosts:
        """Of bringing up and of computing, as far as is known by now."""
        if self._costs is None:
            block_bytes, chunk_tokens = block_bytes_of(self.setup.profile), self._of_role.chunk_tokens
            self._costs = RestoreCosts(self.fit.latency, TRACE_BLOCK_TOKENS, block_bytes, chunk_tokens)
        return self._costs

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
            self._costs = None

    def noisy(self, seconds: float) -> float:
        return seconds * max(1 + NOISE * self.setup.random.gauss(0, 1), 0.1)

    # ---- the tiers below, for the engine

    def turn(self) -> None:
        self._pump.turn()

    def take_stall_s(self) -> float:
        return self.tiers.take_stall_s() if self.tiers else 0.0

    def restored(self, timings: Sequence[RestoreTiming]) -> None:
        for timing in timings:
            self.fit.observe_restore(timing.tier, timing.size_bytes, self.noisy(timing.seconds))
            self._costs = None

    def _publish(self) -> None:
        if self.tiers:
            self.tiers.note_held()
        if changes := self._pump.take_changes():
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


def worker_record(
    profile: Profile, of_role: RoleProfile, worker_id: WorkerId, role: Role, latency: WorkerLatency
) -> WorkerInfo:
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
        latency=latency,
        epoch=EPOCH,
    )
