import pytest
from toy_engine import EOS_TOKEN_ID, VOCABULARY_SIZE, ToyEngine, toy_reference

from baton.errors import BatonError, InvalidRequest, Overloaded
from baton.ids import RequestId
from baton.sampling import SamplingParams, TokenLogprob
from engine.interface import BlocksWritten, EngineRequest, FinishReason, Prefill
from engine.scheduler import Limits

A, B = RequestId("a"), RequestId("b")
PROMPT = tuple(range(1, 12))


def reference(prompt: tuple[int, ...], tokens: int) -> list[int]:
    return toy_reference(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), 64)


# ---- what cannot be served


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ((), {}, "prompt"),
        ((1, -1), {}, "prompt"),
        ((1, VOCABULARY_SIZE), {}, "prompt"),
        (tuple([1] * 64), {}, "prompt"),
        ((1,), {"logit_bias": {VOCABULARY_SIZE: 1.0}}, "logit_bias"),
        ((1,), {"stop_token_ids": (VOCABULARY_SIZE,)}, "stop_token_ids"),
        ((1,), {"stop_token_ids": tuple(range(VOCABULARY_SIZE)), "min_tokens": 1}, "min_tokens"),
    ],
)
def test_impossible_requests_are_refused(prompt: tuple[int, ...], sampling: dict[str, object], param: str) -> None:
    toy = ToyEngine()
    with pytest.raises(InvalidRequest) as refusal:
        toy.add("a", prompt, **sampling)
    assert refusal.value.param == param
    toy.assert_idle()


def test_prompt_logprobs_are_not_prefilled_apart() -> None:
    for prefill in (Prefill.ONLY, Prefill.ELSEWHERE):
        with pytest.raises(InvalidRequest):
            ToyEngine().add("a", PROMPT, prefill, prompt_logprobs=0)


def test_an_id_in_use_is_refused() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT)
    with pytest.raises(InvalidRequest):
        toy.add("a", PROMPT)
    toy.run()
    toy.add("a", PROMPT)
    toy.engine.abort(A)
    toy.assert_idle()


def test_the_queue_is_bounded() -> None:
    toy = ToyEngine(limits=Limits(chunk_tokens=8, sequences_max=8, waiting_max=2))
    toy.add("a", PROMPT)
    toy.add("b", PROMPT)
    with pytest.raises(Overloaded):
        toy.add("c", PROMPT)
    toy.run()
    assert set(toy.ended) == {A, B}
    toy.assert_idle()


# ---- when a request ends


def test_max_tokens() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, max_tokens=5)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT, 5)
    assert toy.reason(A) is FinishReason.LENGTH


def test_context_length_is_the_end_of_every_completion() -> None:
    toy = ToyEngine(context_length=20)
    toy.add("a", PROMPT, max_tokens=None)
    toy.add("b", PROMPT, max_tokens=100)
    toy.run()
    assert len(toy.outputs[A]) == len(toy.outputs[B]) == 20 - len(PROMPT)
    assert toy.reason(A) is FinishReason.LENGTH


def test_a_stop_token_ends_the_request_and_comes_with_it() -> None:
    expected = reference(PROMPT, 8)
    stop = expected[3]
    toy = ToyEngine()
    toy.add("a", PROMPT, max_tokens=8, stop_token_ids=(stop,))
    toy.run()
    assert toy.outputs[A] == expected[: expected.index(stop) + 1]
    assert toy.reason(A) is FinishReason.STOP


def prompt_that_ends_itself() -> tuple[tuple[int, ...], int]:
    """A prompt after which the toy model says end-of-sequence by itself, and after how many tokens."""
    for first in range(1, VOCABULARY_SIZE):
        output = reference((first, 2, 3), 12)
        if EOS_TOKEN_ID in output[1:]:
            return (first, 2, 3), output.index(EOS_TOKEN_ID) + 1
    raise AssertionError


def test_end_of_sequence_unless_ignored() -> None:
    prompt, tokens = prompt_that_ends_itself()
    toy = ToyEngine()
    toy.add("a", prompt, max_tokens=12, ignore_eos=False)
    toy.add("b", prompt, max_tokens=12, ignore_eos=True)
    toy.run()
    assert toy.outputs[A][-1] == EOS_TOKEN_ID
    assert (len(toy.outputs[A]), toy.reason(A)) == (tokens, FinishReason.STOP)
    assert (len(toy.outputs[B]), toy.reason(B)) == (12, FinishReason.LENGTH)


def test_min_tokens_forbids_what_would_stop() -> None:
    prompt, tokens = prompt_that_ends_itself()
    toy = ToyEngine()
    toy.add("a", prompt, max_tokens=14, min_tokens=tokens, ignore_eos=False)
    toy.run()
    assert EOS_TOKEN_ID not in toy.outputs[A][:tokens]
    assert len(toy.outputs[A]) > tokens


# ---- prefix cache


def test_a_second_request_computes_only_what_is_new() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT)
    toy.run()
    toy.add("b", PROMPT)
    toy.run()
    assert toy.ended[A].cached_tokens == 0
    assert toy.ended[B].cached_tokens == toy.admitted[B].cached_tokens == 8
    assert toy.outputs[A] == toy.outputs[B]
    stats = toy.engine.stats()
    assert (stats.prefix_queries_tokens, stats.prefix_hits_tokens) == (22, 8)


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, max_tokens=7)
    toy.run()
    toy.add("b", (*PROMPT, *toy.outputs[A], 5))
    toy.run()
    assert toy.ended[B].cached_tokens == 16
    toy.assert_idle()


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    toy = ToyEngine()
    for name in "ab":
        toy.add(name, PROMPT[:8])
        toy.run()
    assert toy.ended[B].cached_tokens == 4
    assert toy.outputs[A] == toy.outputs[B]


def test_salts_and_settings_keep_prefixes_apart() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, salt="one")
    toy.run()
    toy.add("b", PROMPT, salt="two")
    toy.run()
    assert toy.ended[B].cached_tokens == 0
    without = ToyEngine(limits=Limits(8, 8, 8, prefix_cache=False))
    for name in "ab":
        without.add(name, PROMPT)
        without.run()
    assert without.ended[B].cached_tokens == 0
    assert without.engine.stats().kv_blocks_cached == 0


# ---- logprobs


def test_logprobs_come_with_each_token_if_asked_for() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, logprobs=0)
    toy.add("b", PROMPT)
    toy.step()
    toy.step()
    toy.run()
    assert toy.first[A].logprobs == ((TokenLogprob(toy.outputs[A][0], -0.5),),)
    assert toy.first[B].logprobs == ()


def test_prompt_logprobs_come_with_the_first_token_and_do_not_read_the_cache() -> None:
    toy = ToyEngine(limits=Limits(chunk_tokens=3, sequences_max=8, waiting_max=8))
    toy.add("a", PROMPT)
    toy.run()
    toy.add("b", PROMPT, prompt_logprobs=0)
    toy.run()
    assert toy.ended[B].cached_tokens == 0
    assert toy.first[A].prompt_logprobs == ()
    assert toy.first[B].prompt_logprobs == ((), *((TokenLogprob(token, -1.0),) for token in PROMPT[1:]))
    assert toy.ended[B].prompt_logprobs == ()
    assert toy.outputs[B] == toy.outputs[A]


def test_prompt_logprobs_are_whole_after_a_preemption_in_the_middle() -> None:
    toy = ToyEngine(blocks=6, limits=Limits(chunk_tokens=2, sequences_max=8, waiting_max=8))
    toy.add("a", (1, 2, 3), max_tokens=20)
    toy.step()
    toy.step()
    toy.step()
    toy.add("b", range(20, 34), prompt_logprobs=0, max_tokens=2)
    toy.run()
    assert toy.first[B].preemptions >= 1
    assert toy.first[B].prompt_logprobs == ((), *((TokenLogprob(token, -1.0),) for token in range(21, 34)))
    toy.assert_idle()


# ---- prefill apart


def test_prefill_only_holds_its_blocks_until_released() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ONLY, max_tokens=50)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT, 1)
    assert toy.reason(A) is FinishReason.LENGTH
    assert toy.engine.stats().kv_blocks_used == 3
    toy.engine.release(A)
    assert toy.engine.stats().kv_blocks_cached == 2
    toy.assert_idle()


def test_the_listener_hears_of_each_layer_of_each_block_once() -> None:
    heard: list[tuple[int, BlocksWritten]] = []
    toy = ToyEngine(
        limits=Limits(chunk_tokens=6, sequences_max=8, waiting_max=8),
        listener=lambda layer, written: heard.extend((layer, one) for one in written),
    )
    toy.add("b", (40, 41), max_tokens=6)
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.run()
    ranges = [(0, 1), (1, 2), (2, 3)]
    assert [(layer, w.first, w.end) for layer, w in heard if layer == 0] == [(0, *r) for r in ranges]
    assert [(layer, w.first, w.end) for layer, w in heard if layer == 1] == [(1, *r) for r in ranges]
    assert {w.request_id for _, w in heard} == {A}
    toy.engine.release(A)
    toy.assert_idle()


def test_the_listener_does_not_hear_of_cached_blocks() -> None:
    heard: list[BlocksWritten] = []
    toy = ToyEngine(listener=lambda layer, written: heard.extend(written if layer == 0 else ()))
    toy.add("b", PROMPT[:8], max_tokens=1)
    toy.run()
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.run()
    assert toy.admitted[A].cached_tokens == 8
    assert heard == [BlocksWritten(A, 2, 3)]


def test_admission_is_told_before_anything_is_computed() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ONLY)
    result = toy.step()
    assert [admitted.request_id for admitted in result.admitted] == [A]
    assert toy.runner.steps == []


def disaggregated(prompt: tuple[int, ...], prefill: ToyEngine, decode: ToyEngine, **sampling: object) -> None:
    """Prefills on one engine, decodes on the other; runs neither to the end."""
    decode.add("a", prompt, Prefill.ELSEWHERE, **sampling)
    decode.step()
    prefill.add("a", prompt, Prefill.ONLY, **sampling)
    prefill.run()
    first_lacking = decode.admitted[A].cached_tokens // decode.block_tokens
    pairs = list(zip(decode.admitted[A].blocks, prefill.admitted[A].blocks, strict=True))
    decode.region.copy_blocks(prefill.region, pairs[first_lacking:])
    prefill.engine.release(A)
    decode.engine.commit(A, prefill.outputs[A][0], prefill.ended[A].logprobs)


def test_prefill_elsewhere_gives_the_same_tokens() -> None:
    prefill, decode = ToyEngine(), ToyEngine()
    disaggregated(PROMPT, prefill, decode, max_tokens=6, logprobs=0)
    decode.run()
    assert decode.outputs[A] == reference(PROMPT, 6)
    assert decode.first[A].logprobs == ((TokenLogprob(decode.outputs[A][0], -0.5),),)
    assert [row.start for step in decode.runner.steps for row in step] == [11, 12, 13, 14, 15], "only what is new"
    prefill.assert_idle()
    decode.assert_idle()


def test_a_first_token_from_elsewhere_is_told_at_once() -> None:
    decode = ToyEngine()
    decode.add("b", (30, 31), max_tokens=20)
    disaggregated(PROMPT, ToyEngine(), decode)
    steps = len(decode.runner.steps)
    result = decode.step()
    while not result.generated:
        result = decode.step()
    if A not in decode.outputs:
        result = decode.step()
    assert [generated.request_id for generated in result.generated] == [A]
    assert len(decode.runner.steps) <= steps + 1


def test_news_never_keeps_the_running_from_computing() -> None:
    toy = ToyEngine(blocks=64)
    toy.add("a", PROMPT, max_tokens=10)
    for number in range(30):
        toy.add(f"r{number}", [3], max_tokens=1)
        toy.step()
    assert A in toy.ended


def test_a_first_token_that_stops_ends_the_request() -> None:
    prefill, decode = ToyEngine(), ToyEngine()
    disaggregated(PROMPT, prefill, decode, stop_token_ids=(reference(PROMPT, 1)[0],))
    decode.run()
    assert decode.reason(A) is FinishReason.STOP
    assert len(decode.outputs[A]) == 1
    decode.assert_idle()


def test_reserved_blocks_are_not_found_before_the_commit() -> None:
    prefill, decode = ToyEngine(), ToyEngine()
    decode.add("a", PROMPT, Prefill.ELSEWHERE)
    decode.step()
    decode.add("b", PROMPT)
    decode.run()
    assert decode.ended[B].cached_tokens == 0
    decode.engine.abort(A)
    decode.assert_idle()
    disaggregated(tuple(reversed(PROMPT)), prefill, fresh := ToyEngine())
    fresh.run()
    fresh.add("b", tuple(reversed(PROMPT)))
    fresh.run()
    assert fresh.ended[B].cached_tokens == 8


def test_prefill_elsewhere_can_still_happen_here() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ELSEWHERE)
    toy.run()
    blocks = toy.admitted[A].blocks
    toy.engine.prefill_here(A)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT, 4)
    assert tuple(toy.runner.steps[0][0].blocks)[:3] == blocks
    toy.assert_idle()


def test_reserving_waits_without_spinning() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ELSEWHERE)
    assert toy.engine.has_work
    toy.step()
    assert not toy.engine.has_work
    assert toy.engine.stats().waiting_sequences == 1


# ---- aborts and unknown ids


def test_abort_is_legal_in_every_state() -> None:
    waiting = ToyEngine()
    waiting.add("a", PROMPT)
    running = ToyEngine()
    running.add("a", PROMPT, max_tokens=20)
    for _ in range(4):
        running.step()
    prefilling = ToyEngine(limits=Limits(2, 8, 8))
    prefilling.add("a", PROMPT)
    for _ in range(3):
        prefilling.step()
    reserved = ToyEngine()
    reserved.add("a", PROMPT, Prefill.ELSEWHERE)
    reserved.step()
    committed = ToyEngine()
    disaggregated(PROMPT, ToyEngine(), committed)
    held = ToyEngine()
    held.add("a", PROMPT, Prefill.ONLY)
    held.run()
    for toy in (waiting, running, prefilling, reserved, committed, held):
        toy.engine.abort(A)
        toy.assert_idle()
        toy.add("b", PROMPT)
        toy.run()
        assert toy.outputs[B] == reference(PROMPT, 4)


def test_late_words_about_unknown_requests_are_ignored() -> None:
    toy = ToyEngine()
    toy.engine.abort(A)
    toy.engine.commit(A, 1, ())
    toy.engine.prefill_here(A)
    toy.engine.release(A)
    toy.assert_idle()


def test_a_commit_out_of_turn_is_a_bug() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT)
    with pytest.raises(AssertionError):
        toy.engine.commit(A, 1, ())


# ---- failures


def test_a_failing_step_costs_its_own_requests_only(caplog: pytest.LogCaptureFixture) -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ELSEWHERE)
    toy.add("b", PROMPT, max_tokens=9)
    toy.step()
    toy.runner.fail_next = 1
    toy.step()
    assert set(toy.failed) == {B}
    assert isinstance(toy.failed[B], BatonError)
    assert "MemoryError" in str(toy.failed[B])
    assert caplog.records
    toy.engine.prefill_here(A)
    toy.run()
    assert toy.outputs[A] == reference(PROMPT, 4)
    toy.assert_idle()


def test_a_failing_listener_fails_the_request() -> None:
    def listener(*_: object) -> None:
        raise RuntimeError

    toy = ToyEngine(listener=listener)
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.run()
    assert set(toy.failed) == {A}
    toy.assert_idle()


# ---- the rest


def test_a_request_without_a_seed_gets_one() -> None:
    toy = ToyEngine()
    seen: list[int] = []
    computer = toy.engine._computer
    original = computer._sample
    computer._sample = lambda logits, draws: (seen.extend(d.seed for d in draws), original(logits, draws))[1]
    toy.engine.add(EngineRequest(A, (1,), SamplingParams(max_tokens=1), Prefill.HERE))
    toy.engine.add(EngineRequest(B, (2,), SamplingParams(max_tokens=1, seed=99), Prefill.HERE))
    toy.run()
    assert seen == [7, 99]


def test_waiting_tokens_are_what_is_still_to_compute() -> None:
    toy = ToyEngine(limits=Limits(chunk_tokens=4, sequences_max=1, waiting_max=8))
    toy.add("a", PROMPT)
    toy.add("b", PROMPT)
    assert toy.engine.stats().waiting_tokens == 22
    toy.step()
    toy.step()
    stats = toy.engine.stats()
    assert (stats.waiting_tokens, stats.running_sequences, stats.waiting_sequences) == (18, 1, 1)


def test_a_step_without_work_does_nothing() -> None:
    toy = ToyEngine()
    result = toy.step()
    assert not (result.admitted or result.generated or result.failed)
    assert toy.engine.stats().steps == 0


def test_close_lets_go_of_the_model_before_the_region() -> None:
    toy = ToyEngine()
    toy.engine.close()
    assert toy.region.is_closed
