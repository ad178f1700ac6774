"""One worker's engine in virtual time: the real scheduler over the real block pool, with steps that take what the
latency model says.

Nothing changes while sequences only decode: until one of them ends, fills a block, or somebody comes. Such steps are
computed as one jump, with the same outcome and times as one by one.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.latency import StepWork, WorkerLatency
from engine.interface import FinishReason, Prefill
from engine.scheduler import Chunk, Scheduler
from engine.sequence import LiveSequence
from simulator.sequence import SimulatedSequence
from simulator.virtual_time import VirtualTime


class EngineListener(Protocol):
    """The role of the worker; called in virtual time, between two steps."""

    def admitted(self, sequence: SimulatedSequence) -> None:
        """It holds blocks for its prompt, `cached_tokens` of which were found."""

    def computing(self, sequence: LiveSequence, start: int, end: int, until_s: float) -> None:
        """These tokens of a prompt are being computed, from now until then."""

    def progressed(self, sequence: LiveSequence, tokens: int) -> None:
        """It has decoded so many tokens more."""

    def generated(self, sequence: SimulatedSequence, reason: FinishReason | None) -> None:
        """Its first token, its last token, or both; and a token of a Prefill.ONLY sequence, which then holds its
        blocks until `release`."""


@dataclass(frozen=True, slots=True)
class Jump:
    """Steps that are computed as one: the first takes `first_s`, each one after it `growth_s` more."""

    start_s: float
    first_s: float
    growth_s: float
    steps: int

    def end_s(self, steps: int) -> float:
        """When so many of them are over."""
        return self.start_s + steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    def step_s(self, step: int) -> float:
        """How long one of them takes, counted from 0."""
        return self.first_s + self.growth_s * step

    def steps_by(self, time_s: float) -> int:
        """How many are over once the one that is running then is; at least one."""
        return 1 + bisect_left(range(1, self.steps), time_s, key=self.end_s)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the engine computes now."""

    chunks: Sequence[Chunk]
    work: StepWork
    """Of the first step."""
    jump: Jump


@dataclass(slots=True)
class StepLog:
    """What inter-token latencies are made of: runs of steps, each a gap for as many sequences as it has rows."""

    first_s: list[float]
    growth_s: list[float]
    steps: list[int]
    rows: list[int]
    busy_s: float = 0.0
    steps_computed: int = 0

    @staticmethod
    def empty() -> "StepLog":
        return StepLog([], [], [], [])

    def add(self, first_s: float, growth_s: float, steps: int, rows: int) -> None:
        self.first_s.append(first_s)
        self.growth_s.append(growth_s)
        self.steps.append(steps)
        self.rows.append(rows)


class SimulatedEngine:
    def __init__(
        self,
        time: VirtualTime,
        scheduler: Scheduler,
        latency: WorkerLatency,
        slowdown: float,
        listener: EngineListener,
        measured: Callable[[StepWork, float], None],
        stepped: Callable[[], None],
        steps_max: int = 1 << 20,
    ) -> None:
        """Every step takes `slowdown` times what `latency` says. `measured` is told the last step of each jump and
        how long it took; `stepped` is called after every jump and every change of the pool. `steps_max`: of a jump."""
        self.scheduler, self.log = scheduler, StepLog.empty()
        self._time, self._latency, self._slowdown = time, latency, slowdown
        self._listener, self._measured, self._stepped = listener, measured, stepped
        self._steps_max = steps_max
        self._batch: _Batch | None = None
        self._turn_number = 0
        """Of the planned end of a step; an end that is replanned goes under a new one."""
        self._commits: list[SimulatedSequence] = []

    # ---- what others ask for

    def add(self, sequence: SimulatedSequence) -> None:
        """Raises Overloaded if as many wait as may."""
        self.scheduler.add(sequence)
        self.wake()

    def commit(self, sequence: SimulatedSequence) -> None:
        """A reserved sequence's prompt and its first token have come from elsewhere."""
        self._commits.append(sequence)
        self.wake()

    def prefill_here(self, sequence: SimulatedSequence) -> None:
        """Called from `admitted`, or between steps."""
        self.scheduler.prefill_here(sequence)

    def release(self, sequence: SimulatedSequence) -> None:
        """A Prefill.ONLY sequence's blocks have been sent."""
        self.scheduler.remove(sequence)
        self.wake()

    # ---- steps

    def wake(self) -> None:
        """There is something new: it is looked at once the step that runs now is over."""
        if self._batch is None:
            self._turn()
            return
        steps = self._batch.jump.steps_by(self._time.now_s)
        if steps < self._batch.jump.steps:
            self._plan(self._batch, steps)

    def _turn(self) -> None:
        """Between two steps: news first, then the next step."""
        self._batch = None
        self._join()
        for sequence in self.scheduler.admit():
            assert isinstance(sequence, SimulatedSequence)
            if not sequence.preemptions:
                self._listener.admitted(sequence)
        preemptions = self.scheduler.preemptions
        chunks = self.scheduler.schedule()
        has_preempted = self.scheduler.preemptions > preemptions
        if has_preempted:
            self._note_preempted()
        if chunks:
            self._start(chunks, steps_max=1 if has_preempted else self._steps_max)
        self._stepped()

    def _join(self) -> None:
        commits, self._commits = self._commits, []
        for sequence in commits:
            self.scheduler.commit(sequence)
            self._accept(sequence)

    def _note_preempted(self) -> None:
        """Whoever was sent back to the queue had its last token just now, unless it had not even got on again."""
        for sequence in self.scheduler.waiting:
            assert isinstance(sequence, SimulatedSequence)
            if sequence.output and sequence.last_token_s is None:
                sequence.last_token_s = self._time.now_s

    def _start(self, chunks: Sequence[Chunk], steps_max: int) -> None:
        """After a preemption there may be room for who waits: that is seen after one step."""
        work = work_of(chunks)
        only_decodes = not work.new_tokens
        growth_s = self._slowdown * self._latency.decode.kv_token_s * work.sequences if only_decodes else 0.0
        steps = min(steps_alike(chunks, self.scheduler.block_tokens), steps_max) if only_decodes else 1
        jump = Jump(self._time.now_s, self._slowdown * self._latency.step_time_s(work), growth_s, steps)
        for chunk in chunks:
            if not decodes(chunk):
                self._listener.computing(chunk.sequence, chunk.start, chunk.end, jump.end_s(1))
        self._plan(_Batch(chunks, work, jump), steps)

    def _plan(self, batch: _Batch, steps: int) -> None:
        """The batch ends after so many steps."""
        jump = batch.jump
        self._batch = _Batch(batch.chunks, batch.work, Jump(jump.start_s, jump.first_s, jump.growth_s, steps))
        self._turn_number += 1
        number = self._turn_number
        self._time.at(self._batch.jump.end_s(steps), lambda: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._turn_number:
            return
        batch = self._batch
        assert batch is not None
        self._tell(batch)
        for chunk in batch.chunks:
            self._advance(chunk, batch.jump.steps)
        self._turn()

    def _tell(self, batch: _Batch) -> None:
        work, jump = batch.work, batch.jump
        last = jump.steps - 1
        self.log.busy_s += jump.end_s(jump.steps) - jump.start_s
        self.log.steps_computed += jump.steps
        if work.sequences:
            self.log.add(jump.first_s, jump.growth_s, jump.steps, work.sequences)
        if last:
            work = StepWork(work.sequences, work.kv_tokens + last * work.sequences)
        self._measured(work, jump.step_s(last))

    def _advance(self, chunk: Chunk, steps: int) -> None:
        """Of a chunk that a jump of several steps computes, all but the first are of tokens drawn in between."""
        sequence, samples = chunk.sequence, chunk.samples
        assert isinstance(sequence, SimulatedSequence)
        if steps > 1:
            sequence.generate(steps - 1)
            chunk = Chunk(sequence, chunk.start, chunk.end + steps - 1)
        self.scheduler.advance(chunk)
        if sequence.output:
            self._listener.progressed(sequence, steps)
        if samples:
            self._accept(sequence)

    def _accept(self, sequence: SimulatedSequence) -> None:
        is_first = not sequence.output
        sequence.generate(1)
        if sequence.last_token_s is not None:
            self.log.add(self._time.now_s - sequence.last_token_s, 0.0, 1, 1)
            sequence.last_token_s = None
        reason = sequence.finish_reason
        if is_first or reason is not None:
            self._listener.generated(sequence, reason)
        if reason is not None:
            self._leave(sequence)

    def _leave(self, sequence: SimulatedSequence) -> None:
        if sequence.prefill is Prefill.ONLY:
            self.scheduler.hold(sequence)
        else:
            self.scheduler.remove(sequence)


def work_of(chunks: Sequence[Chunk]) -> StepWork:
    sequences = kv_tokens = new_tokens = 0
    token_context = 0.0
    for chunk in chunks:
        new = chunk.end - chunk.start
        if decodes(chunk):
            sequences += 1
            kv_tokens += chunk.end
        else:
            new_tokens += new
            token_context += new * (chunk.start + new / 2)
    return StepWork(sequences, kv_tokens, new_tokens, token_context)


def decodes(chunk: Chunk) -> bool:
    """Whether it draws the next token of a sequence that took part in the step before; not so the last token of one
    that is computed anew after a preemption."""
    sequence = chunk.sequence
    assert isinstance(sequence, SimulatedSequence)
    return chunk.end - chunk.start == 1 and bool(sequence.output) and sequence.last_token_s is None


def steps_alike(chunks: Sequence[Chunk], block_tokens: int) -> int:
    """For how many steps all sequences go on as in this one: the last one may end a sequence or fill a block."""
    return min(
        min(
            chunk.sequence.tokens_max - len(chunk.sequence.tokens),
            len(chunk.sequence.blocks) * block_tokens - chunk.start,
            (chunk.sequence.published + 1) * block_tokens - chunk.start,
        )
        for chunk in chunks
    )
