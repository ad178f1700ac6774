"""A worker that takes its host memory for quick finds that it crawls: restores are given up, and nobody is lost."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from baton.latency_fit import LatencyFit
from engine.interface import FinishReason, Prefill
from engine.sequence import LiveSequence
from simulator.job import Job
from simulator.profile import Profile, RoleProfile, TierProfile, TierSpeed
from simulator.sequence import SimulatedSequence
from simulator.tiers.worker_tiers import TierSizes, block_bytes_of
from simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest, prompt_block_name
from simulator.virtual_time import VirtualTime
from simulator.worker import Setup, SimulatedWorker

QUICK, CRAWLING = TransferCost(0.0001, 1e9), TransferCost(0.0001, 1e5)
TIER = TierSpeed(restore=CRAWLING, store=QUICK)
ROLE = RoleProfile(kv_blocks=60, chunk_tokens=2048, sequences_max=64)
PROFILE = Profile(
    model="small",
    layers=4,
    context_length=100_000,
    kv_token_bytes=1000,
    latency=WorkerLatency(PrefillCost(0.005, 5e-5, 1e-9), DecodeCost(0.01, 1e-4, 1e-7), TransferCost(0.001, 1e9)),
    prefill=ROLE,
    decode=ROLE,
    tiers=TierProfile(ddr=TIER, ssd=TIER, bytes_in_flight_max=20_000_000),
    message_s=0.0005,
    event_s=0.01,
)
SIZES = TierSizes(ddr_bytes=1000 * block_bytes_of(PROFILE))


class Misled:
    """The worker, which was told otherwise. Implements EngineListener."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        setup = Setup(self.time, PROFILE, Random(1), lambda *_: None, SIZES)
        self.worker = SimulatedWorker(setup, "prefill-0", "prefill", 1.0, self)
        self.worker.fit = LatencyFit(replace(PROFILE.latency, restore={"ddr": QUICK}))
        self.finished: list[SimulatedSequence] = []
        self.finished_s = 0.0
        self.broken_ones: list[int] = []
        self._numbers = 0

    def begin_at(self, time_s: float, ids: Sequence[int], prefill: Prefill = Prefill.HERE) -> None:
        self.time.at(time_s, lambda: self._begin(ids, prefill))

    def _begin(self, ids: Sequence[int], prefill: Prefill) -> None:
        request = TraceRequest(self.time.now_s, len(ids) * TRACE_BLOCK_TOKENS, 3, tuple(ids))
        self.worker.begin(Job(self._numbers, request, [prompt_block_name(block) for block in ids]), prefill)
        self._numbers += 1

    def admitted(self, sequence: SimulatedSequence) -> None: ...

    def computing(self, sequence: LiveSequence, start: int, end: int, until_s: float) -> None: ...

    def progressed(self, sequence: LiveSequence, tokens: int) -> None: ...

    def generated(self, sequence: SimulatedSequence, reason: FinishReason | None) -> None:
        if reason is not None:
            self.finished.append(sequence)
            self.finished_s = self.time.now_s

    def broken(self, sequence: SimulatedSequence) -> None:
        self.broken_ones.append(sequence.number)


def test_what_does_not_come_is_computed() -> None:
    rig = Misled()
    for number in range(3):
        rig.begin_at(10.0 * number, range(100 * number, 100 * number + 40))
    rig.begin_at(60.0, range(40))
    rig.time.run()
    assert len(rig.finished) == 4 and not rig.broken_ones
    assert not rig.finished[-1].restored and rig.finished[-1].cached_tokens == 0
    compute_s = PROFILE.latency.prefill.prompt_time_s(40 * TRACE_BLOCK_TOKENS, 0, 2048)
    assert 60 + compute_s < rig.finished_s < 60 + 1.2 * compute_s, "it has waited a little"
    rig.worker.scheduler.check_integrity([])


def test_a_prompt_to_be_sent_on_that_shares_what_follows_is_taken_back() -> None:
    """Its blocks after those that do not come are others' too: it cannot compute them in their place."""
    rig = Misled()
    rig.begin_at(0.0, range(40))
    rig.begin_at(10.0, range(100, 140))
    rig.begin_at(20.0, range(200, 240))
    rig.begin_at(30.0, range(20, 40))
    rig.begin_at(60.0, [*range(41)], Prefill.ONLY)
    rig.time.run()
    assert rig.broken_ones == [4]
    assert len(rig.finished) == 4
    assert rig.worker.scheduler.pool.used == 0
    rig.worker.scheduler.check_integrity([])
