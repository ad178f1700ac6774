from fake_worker import LENGTH, STOP, output

from baton.rpc import common_pb2
from baton.sampling import SamplingParams
from router.sequence import Delta, SequenceProgress, SequenceRequest, join
from router.text.detokenizer import WindowDetokenizer


def progress(**fields: object) -> SequenceProgress:
    """Tokens are code points."""
    sampling = fields.pop("sampling", SamplingParams(max_tokens=100, seed=1))
    request = SequenceRequest(prompt=(65,), sampling=sampling, **fields)  # type: ignore[arg-type]
    return SequenceProgress(request, WindowDetokenizer(lambda tokens: "".join(map(chr, tokens))))


def codes(text: str) -> list[int]:
    return list(map(ord, text))


def test_the_stop_token_is_counted_and_not_said() -> None:
    sequence = progress()
    delta = sequence.take(output(*codes("ab."), finish=STOP))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("ab", (97, 98, 46), "stop")
    assert sequence.completion_tokens == 3 and sequence.is_finished


def test_the_stop_token_is_said_where_asked_for_and_named_if_the_client_named_it() -> None:
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(46,))
    delta = progress(include_stop=True, sampling=sampling).take(output(*codes("ab."), finish=STOP))
    assert (delta.text, delta.stop_reason) == ("ab.", 46)


def test_at_the_length_everything_is_said_even_what_a_stop_string_might_have_begun() -> None:
    delta = progress(stop=("bcd",)).take(output(*codes("abc"), finish=LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("abc", "length", None)


def test_tokens_after_a_stop_string_are_dropped_with_their_logprobs() -> None:
    logprobs = [common_pb2.PositionLogprobs(tokens=[common_pb2.TokenLogprob(token_id=c)]) for c in codes("abcd")]
    sequence = progress(stop=("b",))
    delta = sequence.take(output(*codes("abcd"), logprobs=logprobs))
    assert (delta.text, delta.token_ids, len(delta.logprobs)) == ("a", (97, 98), 2)
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "b")
    assert sequence.completion_tokens == 2 and sequence.is_finished


def test_text_of_the_first_min_tokens_is_not_searched() -> None:
    sequence = progress(stop=("b",), sampling=SamplingParams(max_tokens=9, min_tokens=2))
    assert sequence.take(output(*codes("ab"))).text == "ab"
    assert sequence.take(output(*codes("cb"))).text == "c"
    assert sequence.is_finished


def test_an_unwanted_output_is_dropped() -> None:
    sequence = progress(wants_output=False)
    prompt_logprobs = [common_pb2.PositionLogprobs()]
    delta = sequence.take(output(97, finish=STOP, prompt_logprobs=prompt_logprobs))
    assert delta == Delta("", (), finish_reason="length", prompt_logprobs=((),))
    assert sequence.completion_tokens == 0


def test_joined_deltas_are_one() -> None:
    first = Delta("a", (1,), prompt_logprobs=((),))
    last = Delta("b", (2, 3), finish_reason="stop", stop_reason="c")
    assert join([first, last]) == Delta("ab", (1, 2, 3), (), "stop", "c", ((),), None)


def test_what_another_worker_goes_on_with_is_all_that_came() -> None:
    sequence = progress(stop=("abx",), sampling=SamplingParams(max_tokens=9, seed=1, prompt_logprobs=0))
    first = sequence.take(output(*codes("ab"), cached_tokens=1))
    assert first.text == "" and sequence.generated == codes("ab"), "held back, and yet generated"
    assert sequence.resume().prompt_logprobs is None and sequence.tokens_max == 7
    second = sequence.take(output(*codes("cd"), finish=LENGTH, cached_tokens=3))
    assert (second.text, sequence.completion_tokens, sequence.cached_tokens) == ("abcd", 4, 1)


def test_before_the_first_token_everything_is_asked_for_again() -> None:
    sequence = progress(sampling=SamplingParams(max_tokens=9, seed=1, prompt_logprobs=0))
    assert sequence.resume() == sequence.request.sampling
    sequence.take(output(97, cached_tokens=3))
    assert sequence.cached_tokens == 3


def test_the_tokens_themselves_say_when_it_is_over() -> None:
    by_length = progress(sampling=SamplingParams(max_tokens=3, seed=1))
    assert by_length.take(output(*codes("ab"))).finish_reason is None
    assert by_length.take(output(*codes("c"))).finish_reason == "length"
    by_token = progress(sampling=SamplingParams(max_tokens=9, seed=1, stop_token_ids=(46,)))
    delta = by_token.take(output(*codes("ab.")))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", 46)


def test_a_text_that_a_stop_string_ends_has_the_timeline_of_its_first_token() -> None:
    sequence = progress(stop=("b",))
    assert sequence.take(output(97, timeline=common_pb2.Timeline(queue_s=1.0))).timeline is None
    assert sequence.take(output(98)).timeline == common_pb2.Timeline(queue_s=1.0)
