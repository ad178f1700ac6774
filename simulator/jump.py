"""Steps that are computed as one, what they compute, and the log of how long they took."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from baton.latency import StepWork
from engine.scheduler import Chunk
from simulator.sequence import SimulatedSequence


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
