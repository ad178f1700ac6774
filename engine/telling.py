"""What a step tells of one request."""

from engine.batch import Drawn
from engine.interface import Admitted, Generated
from engine.sequence import LiveSequence


def admission_of(sequence: LiveSequence, digests: tuple[int, ...], block_tokens: int) -> Admitted:
    """`digests`: of what is cached in HBM, where it is to be sent."""
    restoring = (sequence.found - sequence.published) * block_tokens
    return Admitted(
        sequence.request_id,
        tuple(sequence.blocks),
        sequence.cached_tokens,
        digests,
        restoring_tokens=restoring if sequence.restoring else 0,
    )


def generation_of(sequence: LiveSequence, drawn: Drawn) -> Generated:
    """The token that was just appended."""
    sampling = sequence.request.sampling
    wants_prompt = len(sequence.output) == 1 and sampling.prompt_logprobs is not None
    return Generated(
        sequence.request_id,
        (drawn.token_id,),
        sequence.finish_reason,
        logprobs=() if sampling.logprobs is None else (drawn.logprobs,),
        prompt_logprobs=((), *sequence.prompt_logprobs) if wants_prompt else (),
        cached_tokens=sequence.cached_tokens,
        preemptions=sequence.preemptions,
        restored_tokens=sequence.restored_tokens,
        restore_s=sequence.restore_s,
    )
