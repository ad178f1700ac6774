"""What the line asks for is at any time what its members ask for."""

import hypothesis.strategies as st
from hypothesis import given

from baton.ids import RequestId
from baton.sampling import SamplingParams
from engine.interface import EngineRequest, Prefill
from engine.sequence import LiveSequence
from engine.waiting_line import WaitingLine
from kvcache.block_hash import BlockHasher, root_hash

BLOCK_TOKENS = 4
PREFILLS = tuple(Prefill)
moves = st.lists(st.tuples(st.sampled_from(["join", "take", "leave", "rejoin"]), st.integers(0, 999)), max_size=60)


def sequence(arrival: int, tokens: int, prefill: Prefill) -> LiveSequence:
    request = EngineRequest(RequestId(f"r{arrival}"), tuple(range(tokens)), SamplingParams(), prefill)
    hasher = BlockHasher(root_hash("toy", BLOCK_TOKENS, "float32"), BLOCK_TOKENS)
    return LiveSequence(request, arrival, seed=0, tokens_max=100, stop_token_ids=frozenset(), hasher=hasher)


@given(moves)
def test_it_keeps_the_order_of_arrival_and_its_sums(moves: list[tuple[str, int]]) -> None:
    line = WaitingLine(BLOCK_TOKENS)
    here: list[LiveSequence] = []
    gone: list[LiveSequence] = []
    for arrival, (move, number) in enumerate(moves):
        if move == "join":
            here.append(sequence(arrival, 1 + number % 40, PREFILLS[number % len(PREFILLS)]))
            line.join(here[-1])
        elif move == "rejoin" and gone:
            here.append(gone.pop(number % len(gone)))
            here.sort(key=lambda each: each.arrival)
            line.rejoin(next(each for each in here if each not in line))
        elif move in ("take", "leave") and here:
            index = number % len(here) if move == "leave" else 0
            gone.append(here.pop(index))
            line.leave(gone[-1])
        assert list(line) == here and len(line) == len(here)
        computed_here = [len(each.tokens) for each in here if each.prefill is not Prefill.ELSEWHERE]
        assert line.tokens == sum(computed_here)
        assert line.token_context == sum(position + 0.5 for tokens in computed_here for position in range(tokens))
        assert line.kv_blocks == sum(-(-len(each.tokens) // BLOCK_TOKENS) for each in here)
