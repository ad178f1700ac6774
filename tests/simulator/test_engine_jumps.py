"""The simulated engine: steps take what the latency model says, and a jump comes to the same as its steps."""

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.ids import BlockHash
from baton.latency import DecodeCost, PrefillCost, StepWork, TransferCost, WorkerLatency
from engine.interface import FinishReason, Prefill
from engine.scheduler import Limits, Scheduler
from engine.sequence import LiveSequence
from kvcache.block_pool import BlockPool
from simulator.engine import SimulatedEngine
from simulator.jump import Jump
from simulator.report import gaps_of
from simulator.sequence import SimulatedSequence, begin_sequence
from simulator.trace import prompt_block_name
from simulator.virtual_time import VirtualTime

LATENCY = WorkerLatency(
    PrefillCost(chunk_s=0.01, token_s=0.001, token_context_s=1e-6),
    DecodeCost(step_s=0.02, sequence_s=0.003, kv_token_s=1e-5),
    TransferCost(latency_s=0.0, bytes_per_s=1e9),
)
BLOCK_TOKENS = 8


@dataclass
class Recorder:
    """Implements EngineListener."""

    time: VirtualTime
    events: list[tuple[str, int, float]] = field(default_factory=list)
    decoded: dict[int, int] = field(default_factory=dict)

    def admitted(self, sequence: SimulatedSequence) -> None:
        self.events.append(("admitted", sequence.number, self.time.now_s))

    def computing(self, sequence: LiveSequence, start: int, end: int, until_s: float) -> None:
        assert isinstance(sequence, SimulatedSequence)
        self.events.append((f"computing {start}-{end}", sequence.number, until_s))

    def progressed(self, sequence: LiveSequence, tokens: int) -> None:
        assert isinstance(sequence, SimulatedSequence)
        self.decoded[sequence.number] = self.decoded.get(sequence.number, 0) + tokens

    def generated(self, sequence: SimulatedSequence, reason: FinishReason | None) -> None:
        self.events.append(("finished" if reason else "first token", sequence.number, self.time.now_s))

    def broken(self, sequence: SimulatedSequence) -> None:
        self.events.append(("broken", sequence.number, self.time.now_s))


@dataclass
class Rig:
    blocks: int = 64
    steps_max: int = 1 << 20
    chunk_tokens: int = 32
    slowdown: float = 1.0
    measured: list[tuple[StepWork, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.time = VirtualTime()
        self.heard = Recorder(self.time)
        self.scheduler = Scheduler(BlockPool(self.blocks), BLOCK_TOKENS, Limits(self.chunk_tokens, 8, 100))
        self.engine = SimulatedEngine(
            self.time,
            self.scheduler,
            LATENCY,
            self.slowdown,
            self.heard,
            lambda work, seconds: self.measured.append((work, seconds)),
            lambda: None,
            self.steps_max,
        )
        self.sequences: list[SimulatedSequence] = []

    def sequence(self, prompt_tokens: int, output_tokens: int, prefill: Prefill = Prefill.HERE) -> SimulatedSequence:
        number = len(self.sequences)
        names = [prompt_block_name(100 * number + block) for block in range(prompt_tokens // BLOCK_TOKENS)]
        self.sequences.append(
            begin_sequence(number, names, prompt_tokens, output_tokens, prefill, number, BLOCK_TOKENS)
        )
        return self.sequences[-1]

    def add_at(self, time_s: float, sequence: SimulatedSequence) -> None:
        self.time.at(time_s, lambda: self.engine.add(sequence))

    def gaps(self) -> list[float]:
        gaps, rows = gaps_of(self.engine.log)
        return sorted(gap for gap, count in zip(gaps.tolist(), rows.tolist(), strict=True) for _ in range(int(count)))


def test_one_request_takes_what_the_latency_model_says() -> None:
    rig = Rig()
    rig.add_at(1.0, rig.sequence(prompt_tokens=20, output_tokens=3))
    rig.time.run()
    prefill_s = LATENCY.prefill.prompt_time_s(20, 0, 32)
    first_s = 1.0 + prefill_s
    end_s = first_s + LATENCY.decode.step_time_s(1, 21) + LATENCY.decode.step_time_s(1, 22)
    assert rig.heard.events == [
        ("admitted", 0, 1.0),
        ("computing 0-20", 0, pytest.approx(first_s)),
        ("first token", 0, pytest.approx(first_s)),
        ("finished", 0, pytest.approx(end_s)),
    ]
    assert rig.heard.decoded == {0: 2}
    assert rig.engine.log.busy_s == pytest.approx(end_s - 1.0)


def test_a_slow_worker_needs_longer_for_everything() -> None:
    ends = []
    for slowdown in (1.0, 3.0):
        rig = Rig(slowdown=slowdown)
        rig.add_at(0.0, rig.sequence(prompt_tokens=70, output_tokens=30))
        rig.time.run()
        ends.append(rig.time.now_s)
    assert ends[1] == pytest.approx(3 * ends[0])


def test_who_comes_during_a_jump_is_seen_after_the_step_that_runs() -> None:
    rig = Rig()
    rig.add_at(0.0, rig.sequence(prompt_tokens=8, output_tokens=8))
    first_s = LATENCY.prefill.prompt_time_s(8, 0, 32)
    one_step_s = first_s + LATENCY.decode.step_time_s(1, 9)
    rig.add_at(first_s + 0.001, rig.sequence(prompt_tokens=8, output_tokens=1))
    rig.time.run()
    admitted = [event for event in rig.heard.events if event[0] == "admitted"]
    assert admitted == [("admitted", 0, 0.0), ("admitted", 1, pytest.approx(one_step_s))]


def test_a_prompt_from_elsewhere_joins_between_steps() -> None:
    rig = Rig()
    reserved = rig.sequence(16, 4, Prefill.ELSEWHERE)
    rig.add_at(0.0, reserved)
    rig.time.at(0.5, lambda: rig.engine.commit(reserved))
    rig.time.run()
    assert rig.heard.events[:2] == [("admitted", 0, 0.0), ("first token", 0, 0.5)]
    assert len(rig.gaps()) == 3
    assert rig.scheduler.pool.match([BlockHash(prompt_block_name(0))]).blocks


def test_a_prefill_only_sequence_holds_its_blocks_until_released() -> None:
    rig = Rig()
    sequence = rig.sequence(16, 40, Prefill.ONLY)
    rig.add_at(0.0, sequence)
    rig.time.run()
    assert rig.heard.events[-1][0] == "finished"
    assert rig.scheduler.pool.used == 2
    rig.engine.release(sequence)
    assert rig.scheduler.pool.used == 0


def test_gaps_of_those_that_were_preempted_count_too() -> None:
    rig = Rig(blocks=8)
    rig.add_at(0.0, rig.sequence(prompt_tokens=20, output_tokens=30))
    rig.add_at(0.0, rig.sequence(prompt_tokens=20, output_tokens=30))
    rig.time.run()
    assert rig.scheduler.preemptions
    assert len(rig.gaps()) == 2 * 29, "one gap less than tokens"
    ends = {number: time_s for what, number, time_s in rig.heard.events if what == "finished"}
    firsts = {number: time_s for what, number, time_s in rig.heard.events if what == "first token"}
    assert sum(rig.gaps()) == pytest.approx(sum(ends.values()) - sum(firsts.values()))


arrivals = st.lists(
    st.tuples(
        st.floats(0, 3, allow_nan=False),
        st.integers(1, 40),
        st.integers(1, 40),
        st.sampled_from([Prefill.HERE, Prefill.ELSEWHERE]),
    ),
    min_size=1,
    max_size=8,
)


@example(
    [(0.0, 32, 27, Prefill.HERE), (0.5, 1, 1, Prefill.HERE), (0.0, 25, 25, Prefill.HERE)], 14
)  # room by preemption
@settings(deadline=None, max_examples=60)
@given(arrivals, st.integers(14, 40))
def test_a_jump_equals_its_steps_one_by_one(requests: list[tuple[float, int, int, Prefill]], blocks: int) -> None:
    outcomes = []
    for steps_max in (1, 1 << 20):
        rig = Rig(blocks=blocks, steps_max=steps_max)
        for time_s, prompt_tokens, output_tokens, prefill in requests:
            sequence = rig.sequence(prompt_tokens, output_tokens, prefill)
            rig.add_at(time_s, sequence)
            if prefill is Prefill.ELSEWHERE:
                rig.time.at(time_s + 7.0, lambda rig=rig, sequence=sequence: commit_when_reserved(rig, sequence))
        rig.time.run()
        rig.scheduler.check_integrity([])
        outcomes.append(rig)
    stepwise, jumped = outcomes
    assert [(what, number) for what, number, _ in jumped.heard.events] == [
        (what, number) for what, number, _ in stepwise.heard.events
    ]
    times = [[time_s for *_, time_s in rig.heard.events] for rig in outcomes]
    assert times[1] == pytest.approx(times[0], rel=1e-9)
    assert jumped.gaps() == pytest.approx(stepwise.gaps(), rel=1e-9)
    assert jumped.engine.log.busy_s == pytest.approx(stepwise.engine.log.busy_s, rel=1e-9)
    assert jumped.engine.log.steps_computed == stepwise.engine.log.steps_computed
    assert jumped.scheduler.preemptions == stepwise.scheduler.preemptions
    assert jumped.heard.decoded == stepwise.heard.decoded


def commit_when_reserved(rig: Rig, sequence: SimulatedSequence) -> None:
    if sequence in rig.scheduler.reserved:
        rig.engine.commit(sequence)
    else:
        rig.time.after(1.0, lambda: commit_when_reserved(rig, sequence))


def test_jumps_are_few() -> None:
    rig = Rig(blocks=2000)
    rig.add_at(0.0, rig.sequence(prompt_tokens=16, output_tokens=1000))
    rig.time.run()
    assert len(rig.measured) < 1000 / BLOCK_TOKENS + 3


@given(st.floats(1e-4, 1), st.floats(0, 1e-3), st.integers(1, 300), st.floats(0, 1))
def test_a_jump_that_is_cut_ends_with_the_step_that_runs(
    first_s: float, growth_s: float, steps: int, share: float
) -> None:
    jump = Jump(5.0, first_s, growth_s, steps)
    time_s = 5.0 + share * (jump.end_s(steps) - 5.0)
    done = jump.steps_by(time_s)
    assert 1 <= done <= steps
    assert jump.end_s(done) >= time_s or done == steps
    assert done == 1 or jump.end_s(done - 1) < time_s
