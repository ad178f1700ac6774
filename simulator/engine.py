"""One worker's engine in virtual time: the real scheduler over the real block pool, with steps that take what the
latency model says.

Nothing changes while sequences only decode: until one of them ends, fills a block, or somebody comes. Such steps are
computed as one jump, with the same outcome and times as one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from baton.latency import StepWork, WorkerLatency
from engine.interface import FinishReason, Prefill
from engine.scheduler import Chunk, Scheduler
from engine.sequence import LiveSequence
from simulator.jump import Jump, StepLog, decodes, steps_alike, work_of
from simulator.restores import Below, NothingBelow, Restores
from simulator.sequence import SimulatedSequence
from simulator.virtual_time import VirtualTime

TURN_S = 0.0002
"""Between two turns of an engine that has nothing to compute."""


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

    def broken(self, sequence: SimulatedSequence) -> None:
        """A Prefill.ONLY sequence is gone: what it was to find could not be restored, and others share what follows."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the engine computes now."""

    chunks: Sequence[Chunk]
    work: StepWork
    """Of the first step."""
    jump: Jump
    is_held_up: bool
    """By copies or restores: it says nothing of how long computing takes."""


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
        below: Below = NothingBelow(),  # noqa: B008 - without state
    ) -> None:
        """Every step takes `slowdown` times what `latency` says. `measured` is told the last step of each jump and
        how long it took; `stepped` is called after every jump and every change of the pool. `steps_max`: of a jump.
        `below`: the tiers, if there are any."""
        self.scheduler, self.log = scheduler, StepLog.empty()
        self._time, self._latency, self._slowdown = time, latency, slowdown
        self._listener, self._measured, self._stepped = listener, measured, stepped
        self._steps_max = steps_max
        self._below, self._restores = below, Restores(time, scheduler, below)
        self._batch: _Batch | None = None
        self._turn_number = 0
        """Of the planned end of a step; an end that is replanned goes under a new one."""
        self._turned_s, self._has_news = 0.0, False
        self._check_s: float | None = None
        """When it will see whether a restore has turned slow."""
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

    def wake_below(self) -> None:
        """Something below the pool has ended, or wants another turn; these are not many at one instant."""
        if not self._has_news:
            self._has_news = True
            self._time.at(max(self._time.now_s, self._turned_s + TURN_S), self._hear_below)

    def _hear_below(self) -> None:
        self._has_news = False
        self.wake()

    def look(self) -> None:
        """A restore has got on. A step that runs is followed by another look anyway, if anybody waits to join."""
        if self._batch is None:
            self._turn()

    def _turn(self) -> None:
        """Between two steps: news first, then the next step."""
        self._batch, self._turned_s = None, self._time.now_s
        self._settle()
        self._below.turn()
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
            is_one = has_preempted or self._restores.may_join
            self._start(chunks, steps_max=1 if is_one else self._steps_max)
        self._check_later()
        self._stepped()

    def _settle(self) -> None:
        for broken in self._restores.settle():
            self.scheduler.remove(broken)
            self._listener.broken(broken)

    def _check_later(self) -> None:
        check_s = self._restores.check_s
        if check_s is not None and check_s != self._check_s:
            self._check_s = check_s
            self._time.at(max(check_s, self._time.now_s), self.wake)

    def _join(self) -> None:
        commits, self._commits = self._commits, []
        for sequence in commits:
            self.scheduler.commit(sequence)
            self._accept(sequence)
            if sequence.restoring is not None or sequence.remaining > 1:
                sequence.last_token_s = self._time.now_s  # its next step may not be the next one

    def _note_preempted(self) -> None:
        """Whoever was sent back to the queue had its last token just now, unless it had not even got on again."""
        for sequence in self.scheduler.waiting:
            assert isinstance(sequence, SimulatedSequence)
            if sequence.output and sequence.last_token_s is None:
                sequence.last_token_s = self._time.now_s

    def _start(self, chunks: Sequence[Chunk], steps_max: int) -> None:
        """After a preemption there may be room for who waits: that is seen after one step. A step lasts at least until
        what its sequences restore has landed: that comes layer by layer ahead of the computing, as long as it keeps
        ahead."""
        now_s, work = self._time.now_s, work_of(chunks)
        only_decodes = not work.new_tokens
        growth_s = self._slowdown * self._latency.decode.kv_token_s * work.sequences if only_decodes else 0.0
        first_s = self._slowdown * self._latency.step_time_s(work)
        held_up_s = max(self._below.take_stall_s(), self._restores.landed_s(chunks) - now_s - first_s)
        if held_up_s > 0.0:
            first_s, steps_max = first_s + held_up_s, 1
        steps = min(steps_alike(chunks, self.scheduler.block_tokens), steps_max) if only_decodes else 1
        jump = Jump(now_s, first_s, growth_s, steps)
        for chunk in chunks:
            if not decodes(chunk):
                self._compute(chunk, jump.end_s(1))
        self._plan(_Batch(chunks, work, jump, held_up_s > 0.0), steps)

    def _compute(self, chunk: Chunk, until_s: float) -> None:
        """What a sequence that is sent on has restored is told with the first chunk that it computes."""
        sequence, block_tokens = chunk.sequence, self.scheduler.block_tokens
        first, sequence.untold = sequence.untold, None
        if first is not None and first < sequence.found:
            self._listener.computing(sequence, first * block_tokens, sequence.found * block_tokens, until_s)
        self._listener.computing(sequence, chunk.start, chunk.end, until_s)

    def _plan(self, batch: _Batch, steps: int) -> None:
        """The batch ends after so many steps."""
        jump = batch.jump
        jump = Jump(jump.start_s, jump.first_s, jump.growth_s, steps)
        self._batch = _Batch(batch.chunks, batch.work, jump, batch.is_held_up)
        self._turn_number += 1
        number = self._turn_number
        self._time.at(self._batch.jump.end_s(steps), lambda: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._turn_number:
            return
        batch = self._batch
        assert batch is not None
        if (landed_s := self._restores.landed_s(batch.chunks)) > -inf:  # at this very instant, but for rounding
            self._time.at(max(landed_s, self._time.now_s), lambda: self._end(number))
            return
        self._settle()  # what was restored is known before anything that was computed from it
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
        if not batch.is_held_up:
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
