"""Measures a worker's speed before it serves: real steps of many sizes, on blocks that nobody holds yet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from baton.clock import Clock
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from engine.batch import Row
from engine.interface import StepTiming

SECONDS_MAX = 0.5
"""No step begins later than this. Steps grow at most fourfold from one to the next of a kind, so that the last one
takes no more than a few times this."""
ROUNDS = 3
"""The first only warms up, as far as there is time for a second."""
BATCH_MAX = 32
CONTEXT_CHUNKS_MAX = 2
DECODE_CONTEXT_MAX = 512
"""How long the contexts are at most."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """So many sequences compute `new` tokens each, behind `context` others."""

    sequences: int
    new: int
    context: int


def step_shapes(layout: KVLayout, context_length: int, chunk_tokens: int, sequences_max: int) -> list[StepShape]:
    """Prefill and decode in turns, small ones first; all of them fit into the pool and the context."""

    def context_max(sequences: int, new: int) -> int:
        return min(context_length, layout.pool_blocks // sequences * layout.block_tokens) - new

    batch = min(sequences_max, BATCH_MAX, layout.pool_blocks)
    few = max(1, batch // 4)
    chunk = min(max(2, chunk_tokens), context_max(1, 0))
    far = min(CONTEXT_CHUNKS_MAX * chunk, context_max(1, chunk))
    prefills = [(chunk // 16, 0), (chunk // 4, 0), (chunk, 0), (chunk, far)]
    decodes = [(1, 0), (batch, 0), (few, DECODE_CONTEXT_MAX), (batch, DECODE_CONTEXT_MAX)]
    shapes: list[StepShape] = []
    for (new, context), (sequences, behind) in zip(prefills, decodes, strict=True):
        shapes.append(StepShape(1, max(2, new), context))
        shapes.append(StepShape(sequences, 1, min(behind, context_max(sequences, 1))))
    return list(dict.fromkeys(shapes))


def measure_steps(
    shapes: Sequence[StepShape],
    blocks: Sequence[BlockId],
    layout: KVLayout,
    vocabulary_size: int,
    measure: Callable[[Sequence[Row]], StepTiming],
    clock: Clock,
) -> tuple[StepTiming, ...]:
    """In the order of measuring. `blocks` are the caller's and enough for each shape; what they hold is overwritten."""
    until_s = clock() + SECONDS_MAX
    measured: list[StepTiming] = []
    for shape in chain.from_iterable(repeat(shapes, ROUNDS)):
        if clock() >= until_s:
            break
        measured.append(measure(list(_rows(shape, blocks, layout, vocabulary_size))))
    again = max(0, len(measured) - len(shapes))
    return tuple(measured[min(again, len(shapes)) :])


def _rows(shape: StepShape, blocks: Sequence[BlockId], layout: KVLayout, vocabulary_size: int) -> Iterator[Row]:
    each = layout.blocks_for(shape.context + shape.new)
    for index in range(shape.sequences):
        tokens = tuple((7919 * (index + position)) % vocabulary_size for position in range(shape.new))
        table = blocks[index * each : (index + 1) * each]
        yield Row(RequestId(f"self-test-{index}"), tokens, shape.context, table, samples=True)
