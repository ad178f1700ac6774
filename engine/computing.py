"""A step's forward pass: gated by what is still on its way up, heard layer by layer, and sampled from where right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from baton.clock import Clock
from baton.sampling import PositionLogprobs, SamplingParams
from engine.batch import Draw, Drawn, Row
from engine.digest_book import DigestBook
from engine.interface import BlocksWritten, LayerListener, StepTiming
from engine.restoring import RestoreGate
from engine.rows import draw_for, fresh_blocks, restored_before, row_of, written_by
from engine.scheduler import Chunk
from engine.sequence import LiveSequence
from engine.settler import Settler
from engine.stopwatch import Stopwatch, work_of
from kvtransfer.interface import Region

WAITED_MAX_S = 0.0005
"""A step that was held up by more than this says nothing of how long computing takes."""
GREEDY = SamplingParams(temperature=0)


class Logits(Protocol):
    """What a forward pass leaves behind; its sampled rows are for the sampler alone."""

    @property
    def prompt_logprobs(self) -> Sequence[tuple[PositionLogprobs, ...]]:
        """For each row of the step, in order; empty where it did not ask."""

    def only(self, rows: Sequence[int], sampled: Sequence[int]) -> Self:
        """Those of these rows; `sampled`: which of the rows that sample they are."""


AnyLogits = TypeVar("AnyLogits", bound=Logits)
RunnerLogits = TypeVar("RunnerLogits", bound=Logits, covariant=True)
OnLayer = Callable[[int], None]
Sample = Callable[[AnyLogits, Sequence[Draw]], list[Drawn]]
"""One token for each row that samples, in order."""


class Runner(Protocol[RunnerLogits]):
    def forward(self, rows: Sequence[Row], on_layer: OnLayer | None) -> RunnerLogits:
        """Computes the rows, writing their keys and values; calls `on_layer` as each layer's lie in the region."""

    def close(self) -> None:
        """Lets go of the region."""


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of a step. Nothing of it is published yet."""

    right: Sequence[Chunk]
    """That were computed from what they should be..."""
    prompt_logprobs: Sequence[tuple[PositionLogprobs, ...]]
    """...of each of them..."""
    sampled: Sequence[LiveSequence]
    """...and whose next token was drawn..."""
    drawn: Sequence[Drawn]
    """...which is this."""
    timing: StepTiming | None


class StepComputer(Generic[AnyLogits]):
    def __init__(
        self,
        runner: Runner[AnyLogits],
        sample: Sample[AnyLogits],
        listener: LayerListener | None,
        settler: Settler,
        digests: DigestBook,
        region: Region,
        clock: Clock,
    ) -> None:
        self._runner, self._sample, self._listener = runner, sample, listener
        self._settler, self._digests = settler, digests
        self._clock, self._stopwatch = clock, Stopwatch(clock)
        self._region = region

    def begin(self) -> None:
        """A step is about to be scheduled."""
        self._stopwatch.begin()

    def reset(self) -> None:
        """Nothing is computed any more that the stopwatch could wait for."""
        self._stopwatch.reset()

    def compute(self, chunks: Sequence[Chunk]) -> Computed:
        """Raises whatever goes wrong in the model, the sampler, the listener or the digester."""
        gate = RestoreGate([r for chunk in chunks if (r := chunk.sequence.restoring)], self._clock)
        restored = [(chunk, event) for chunk in chunks for event in restored_before(chunk)]
        written = [(chunk, event) for chunk in chunks for event in written_by(chunk, self._region.layout.block_tokens)]
        events = [*restored, *written]
        on_layer = self._on_layer([event for _, event in events])
        logits = self._runner.forward([row_of(chunk) for chunk in chunks], gate.before(on_layer))
        right = self._settler.settle_step(gate, chunks)
        if len(right) < len(chunks):
            logits = logits.only(*_indices(chunks, right))
        sampled = [chunk.sequence for chunk in right if chunk.samples]
        self._digests.begin([fresh_blocks(chunk, event) for chunk, event in events if chunk in right])
        drawn = self._sample(logits, [draw_for(sequence) for sequence in sampled])
        timing = self._timing(chunks, gate, is_done=bool(sampled) or self._region.is_host)
        return Computed(right, logits.prompt_logprobs, sampled, drawn, timing)

    def _on_layer(self, written: Sequence[BlocksWritten]) -> OnLayer | None:
        listener = self._listener
        if listener is None or not written:
            return None
        return lambda layer: listener(layer, written)

    def _timing(self, chunks: Sequence[Chunk], gate: RestoreGate, *, is_done: bool) -> StepTiming | None:
        """Nothing of a step that waited for what it restored: it would not be the computing that was measured."""
        if gate.waited_s > WAITED_MAX_S:
            self._stopwatch.reset()
            return None
        return self._stopwatch.end(work_of((chunk.start, chunk.end) for chunk in chunks), is_done=is_done)

    def measure(self, rows: Sequence[Row]) -> StepTiming:
        """Computes rows that are nobody's, and draws from all of them."""
        spans = [(row.start, row.start + len(row.token_ids)) for row in rows]
        draws = [Draw(GREEDY, 0, range(end), (), frozenset()) for _, end in spans]
        began_s = self._clock()
        self._sample(self._runner.forward(rows, None), draws)
        return StepTiming(work_of(spans), self._clock() - began_s)

    def close(self) -> None:
        self._runner.close()


def _indices(chunks: Sequence[Chunk], right: Sequence[Chunk]) -> tuple[list[int], list[int]]:
    """Which of the chunks are right, and which of those that sample."""
    sampled = [chunk for chunk in chunks if chunk.samples]
    return [i for i, chunk in enumerate(chunks) if chunk in right], [i for i, c in enumerate(sampled) if c in right]
