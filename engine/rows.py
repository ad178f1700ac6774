"""A scheduled chunk in the words of those who compute it, draw from it and send it."""

from collections.abc import Iterator

from engine.batch import Draw, Row
from engine.digest_book import FreshBlocks
from engine.interface import BlocksWritten, Prefill
from engine.scheduler import Chunk
from engine.sequence import LiveSequence


def row_of(chunk: Chunk) -> Row:
    sequence, prompt_tokens = chunk.sequence, len(chunk.sequence.request.prompt)
    asks = sequence.request.sampling.prompt_logprobs if sequence.wants_prompt_logprobs else None
    return Row(
        request_id=sequence.request_id,
        token_ids=tuple(sequence.tokens[chunk.start : chunk.end]),
        start=chunk.start,
        blocks=sequence.blocks,
        samples=chunk.samples,
        prompt_logprobs=asks,
        next_token=sequence.tokens[chunk.end] if asks is not None and chunk.end < prompt_tokens else None,
    )


def draw_for(sequence: LiveSequence) -> Draw:
    return Draw(
        params=sequence.request.sampling,
        seed=sequence.seed,
        prompt=sequence.request.prompt,
        output=sequence.output,
        forbidden=sequence.forbidden,
    )


def written_by(chunk: Chunk, block_tokens: int) -> Iterator[BlocksWritten]:
    """The blocks that a chunk makes final, if they are to be sent; the last chunk's include a partial last block."""
    sequence = chunk.sequence
    if sequence.prefill is not Prefill.ONLY:
        return
    first = chunk.start // block_tokens
    end = len(sequence.blocks) if chunk.samples else chunk.end // block_tokens
    if first < end:
        yield BlocksWritten(sequence.request_id, first, end)


def restored_before(chunk: Chunk) -> Iterator[BlocksWritten]:
    """The restored blocks of a sequence that are to be sent, with the first chunk that it computes: told now."""
    sequence = chunk.sequence
    first, sequence.untold = sequence.untold, None
    if first is not None and first < sequence.found:
        yield BlocksWritten(sequence.request_id, first, sequence.found)


def fresh_blocks(chunk: Chunk, event: BlocksWritten) -> FreshBlocks:
    """The blocks of one of the chunk's events."""
    return FreshBlocks(event.request_id, event.first, tuple(chunk.sequence.blocks[event.first : event.end]))
