"""Requests as the simulated engines see them: how many tokens and what their blocks are called, but not the tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from baton.ids import BlockHash, RequestId
from baton.latency import Tier
from baton.sampling import SamplingParams
from engine.interface import EngineRequest, Prefill
from engine.sequence import LiveSequence
from kvcache.block_hash import HASH_BYTES, BlockHasher
from simulator.trace import answer_block_name

GREEDY = SamplingParams(temperature=0)
NO_ROOT = BlockHash(bytes(HASH_BYTES))


class GivenNames(BlockHasher):
    """Names blocks as a trace does: the prompt's whole blocks by its ids, those after them by its number."""

    __slots__ = ("_number", "_prompt_names")

    def __init__(self, prompt_names: Sequence[BlockHash], number: int, block_tokens: int) -> None:
        super().__init__(NO_ROOT, block_tokens)
        self._prompt_names, self._number = prompt_names, number

    def extend(self, tokens: Sequence[int]) -> None:
        named = len(self.hashes)
        names = named + len(tokens) // self._block_tokens
        self.hashes += self._prompt_names[named:names]
        self.hashes += [answer_block_name(self._number, block) for block in range(len(self.hashes), names)]


@dataclass(slots=True, eq=False)
class SimulatedSequence(LiveSequence):
    """`tokens` and `output` have the right lengths; what is in them means nothing."""

    number: int = 0
    """Of its request, in the trace."""
    last_token_s: float | None = None
    """Set while it does not take part in every step: when its last token came."""
    restored: Mapping[Tier, int] = field(default_factory=dict)
    """Blocks that came up when it was first admitted, by the tier that they came from."""

    def generate(self, tokens: int) -> None:
        self.tokens += bytes(tokens)
        self.output += bytes(tokens)


def begin_sequence(
    number: int,
    names: Sequence[BlockHash],
    prompt_tokens: int,
    output_tokens: int,
    prefill: Prefill,
    arrival: int,
    block_tokens: int,
) -> SimulatedSequence:
    """`names` are those of the prompt's whole blocks."""
    sequence = SimulatedSequence(
        request=EngineRequest(RequestId(str(number)), (), GREEDY, prefill),
        arrival=arrival,
        seed=0,
        tokens_max=prompt_tokens + output_tokens,
        stop_token_ids=frozenset(),
        hasher=GivenNames(names, number, block_tokens),
        number=number,
    )
    # A byte a token instead of a pointer: thousands of prompts of many thousand tokens may wait.
    sequence.tokens, sequence.output = cast(list[int], bytearray(prompt_tokens)), cast(list[int], bytearray())
    return sequence
