from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from baton.latency import DEFAULT_LATENCY, DecodeCost, PrefillCost, StepWork, TransferCost, WorkerLatency

PREFILL = PrefillCost(chunk_s=0.25, token_s=0.5, token_context_s=0.125)
DECODE = DecodeCost(step_s=2.0, sequence_s=0.5, kv_token_s=0.0625)
LATENCY = WorkerLatency(PREFILL, DECODE, TransferCost(latency_s=0.5, bytes_per_s=100.0))

lengths = st.integers(0, 100_000)
works = st.builds(
    StepWork, st.integers(0, 512), st.integers(0, 10**6), st.integers(0, 8192), st.integers(0, 10**9), st.integers(1, 9)
)


def test_a_chunk_costs_for_itself_for_its_tokens_and_for_what_they_attend_to() -> None:
    assert PREFILL.chunk_time_s(4, 10.0) == 0.25 + 4 * 0.5 + 4 * 10 * 0.125


@given(new=lengths, cached=lengths, chunk_tokens=st.integers(64, 4096))
def test_a_prompt_takes_what_its_chunks_take(new: int, cached: int, chunk_tokens: int) -> None:
    by_chunk_s = 0.0
    for start in range(0, new, chunk_tokens):
        chunk = min(chunk_tokens, new - start)
        by_chunk_s += PREFILL.chunk_time_s(chunk, cached + start + chunk / 2)
    assert PREFILL.prompt_time_s(new, cached, chunk_tokens) == pytest.approx(by_chunk_s)


def test_half_of_a_chunk_is_what_its_tokens_attend_to_of_it() -> None:
    """Token by token: the n-th attends to the n before it, and half counts for itself."""
    new, cached = 37, 5
    one_by_one = sum(cached + position + 0.5 for position in range(new))
    assert PrefillCost(0, 0, 1).chunk_time_s(new, cached + new / 2) == one_by_one
    assert PrefillCost(0, 0, 1).prompt_time_s(new, cached, 8) == one_by_one


def test_nothing_new_takes_no_time() -> None:
    assert PREFILL.prompt_time_s(0, 1000, 512) == 0


def test_a_decode_step_and_a_transfer() -> None:
    assert DECODE.step_time_s(3, 80) == 2 + 3 * 0.5 + 80 * 0.0625
    assert LATENCY.transfer.time_s(250) == 0.5 + 2.5


def test_a_step_that_only_decodes_is_a_decode_step() -> None:
    assert LATENCY.step_time_s(StepWork(sequences=3, kv_tokens=80)) == DECODE.step_time_s(3, 80)


def test_a_step_that_only_prefills_is_its_chunk() -> None:
    work = StepWork(new_tokens=4, token_context=4 * 10.0)
    assert LATENCY.step_time_s(work) == PREFILL.chunk_time_s(4, 10.0)


def test_a_step_of_both_kinds_reads_the_weights_once() -> None:
    chunk, decode = StepWork(new_tokens=4, token_context=40.0), StepWork(sequences=3, kv_tokens=80)
    both = StepWork(3, 80, 4, 40.0)
    apart_s = LATENCY.step_time_s(chunk) + LATENCY.step_time_s(decode)
    assert LATENCY.step_time_s(both) == apart_s - DECODE.step_s
    assert LATENCY.added_decode_s(both) == apart_s - LATENCY.step_time_s(chunk) - DECODE.step_s


def test_chunks_that_were_timed_together_cost_as_much_as_one_by_one() -> None:
    chunks = [StepWork(new_tokens=8, token_context=8 * (start + 4.0)) for start in (0, 8, 16)]
    together = chunks[0] + chunks[1] + chunks[2]
    assert together.steps == 3
    assert LATENCY.step_time_s(together) == sum(map(LATENCY.step_time_s, chunks))
    assert LATENCY.step_time_s(together) == PREFILL.prompt_time_s(24, 0, 8)


@given(works, works, works)
def test_work_adds_up_in_any_order(a: StepWork, b: StepWork, c: StepWork) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert (a + b).kv_tokens == a.kv_tokens + b.kv_tokens and (a + b).steps == a.steps + b.steps


@given(works, works)
def test_more_work_never_takes_less(work: StepWork, more: StepWork) -> None:
    """Where it is of the same kind: a chunk beside a decode step may be cheaper than the step's own overhead."""
    more = replace(more, new_tokens=more.new_tokens if work.new_tokens else 0)
    assert DEFAULT_LATENCY.step_time_s(work + more) >= DEFAULT_LATENCY.step_time_s(work) > 0
