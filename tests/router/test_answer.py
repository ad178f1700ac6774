"""A stream's events: most of them are not built but written around their text, and must be the same."""

import json
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.catalog import ServedModel
from router.generation import Generation, Usage
from router.http.answer import Answer
from router.http.chat import ChatAnswer
from router.http.completions import CompletionAnswer
from router.http.openai_requests import ChatCompletionRequest, CompletionRequest
from router.sequence import Delta, SequenceProgress, SequenceRequest
from router.text.tokenizer import Tokenizer


class HalfDone:
    """As much of a generation as an answer looks at."""

    request_id, is_finished, usage = 'a"b', False, Usage(3, 2, 1)

    def __init__(self, tokenizer: Tokenizer) -> None:
        request = SequenceRequest((7, 8, 9), sampling=cast(Any, None))
        self.sequences = [SequenceProgress(request, tokenizer.detokenizer()) for _ in range(2)]


class Served:
    name = "the \\ model"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = self.prompts = tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_directory: Any) -> Tokenizer:
    return Tokenizer.load(model_directory)


def answer(tokenizer: Tokenizer, kind: str, **fields: Any) -> Answer[Any]:
    generation, served = cast(Generation, HalfDone(tokenizer)), cast(ServedModel, Served(tokenizer))
    if kind == "chat":
        asked = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        return ChatAnswer(ChatCompletionRequest.model_validate(asked), generation, served, 12)
    return CompletionAnswer(
        CompletionRequest.model_validate({"prompt": "hi", "stream": True, **fields}), generation, served, 12
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"return_token_ids": True},
    {"n": 2},
]


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("options", OPTIONS)
@settings(deadline=None, max_examples=25)
@given(
    deltas=st.lists(
        st.tuples(st.integers(0, 1), st.text(max_size=8), st.sampled_from([None, None, None, "stop", "length"])),
        max_size=6,
    )
)
def test_every_event_says_what_its_chunk_does(
    tokenizer: Tokenizer, kind: str, options: dict[str, Any], deltas: list[tuple[int, str, Any]]
) -> None:
    written, built = answer(tokenizer, kind, **options), answer(tokenizer, kind, **options)
    for index, text, reason in deltas:
        delta = Delta(text, (5,), finish_reason=reason)
        event, chunk = written.event(index, delta), built.chunk(index, delta)
        assert (None if event is None else json.loads(event)) == chunk
        assert event is None or "\n" not in event


def test_an_echoed_prompt_comes_with_the_first_event_alone(tokenizer: Tokenizer) -> None:
    echoing = answer(tokenizer, "completion", echo=True)
    texts = [json.loads(echoing.event(0, Delta(text, (5,))) or "")["choices"][0]["text"] for text in ("a", "b")]
    assert texts == ["hia", "b"]
