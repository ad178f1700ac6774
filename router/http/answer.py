"""How a generation is written in the OpenAI API's shape: whole, or as a stream of chunks."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from baton.rpc import common_pb2
from router.catalog import ServedModel
from router.frontend import Order
from router.generation import Generation, Usage
from router.http.errors import json_text
from router.http.openai_requests import GenerationRequest
from router.http.openai_responses import UsageInfo
from router.sequence import Delta, SequenceRequest, join

Json = Mapping[str, Any]
Request = TypeVar("Request", bound=GenerationRequest)
MARK = "\x00"
"""Stands for the text in what is written around it; no id or name has it."""
LOGPROB_MIN = -9999.0
"""What OpenAI writes for a token that cannot be; JSON has no infinity."""


class Answer(ABC, Generic[Request]):
    """One request's answer."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request: Request, generation: Generation, served: ServedModel, created_s: int) -> None:
        """`created_s`: seconds since 1970."""
        self.request, self.generation, self.served = request, generation, served
        self._id = f"{self.id_prefix}-{generation.request_id}"
        self._created_s = created_s
        self._model = request.model or served.name
        self._timeline: Json | None = None
        self._has_plain_deltas = not (self.shows_tokens or request.has_continuous_usage)
        self._frames: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def choice(self, index: int, delta: Delta, *, is_whole: bool) -> Json:
        """The entry in `choices`; a whole answer is the only delta of its sequence."""

    def opening(self) -> list[Json]:
        """Chunks that come before the first delta."""
        return []

    def beside_choices(self) -> dict[str, Any]:
        """What a whole answer has beyond every API's fields."""
        return {}

    @property
    def shows_tokens(self) -> bool:
        """Whether a delta is worth a chunk though its text is still held back."""
        return bool(self.request.return_token_ids)

    def event(self, index: int, delta: Delta) -> str | None:
        """A chunk of the stream as JSON; None where the delta has nothing to show yet."""
        if self._has_plain_deltas and delta.finish_reason is None:
            return self._plain_event(index, delta.text) if delta.text else None
        chunk = self.chunk(index, delta)
        return None if chunk is None else json_text(chunk)

    def _plain_event(self, index: int, text: str) -> str:
        """All but the text is the same in nearly every event, and is written once: it takes longer than the rest."""
        if (frame := self._frames.get(index)) is None:
            plain = self.wrap([self.choice(index, Delta(MARK, ()), is_whole=False)])
            before, after = json_text(plain).split(json_text(MARK))
            frame = self._frames[index] = before, after
        return frame[0] + json_text(text) + frame[1]

    def chunk(self, index: int, delta: Delta) -> Json | None:
        """None where the delta has nothing to show yet."""
        self._note(index, delta)
        if not (delta.text or delta.finish_reason or self.shows_tokens):
            return None
        is_last = not self.request.includes_usage and self.generation.is_finished
        timeline = {"timeline": self._timeline} if is_last and self.request.timeline else {}
        return self.wrap([self.choice(index, delta, is_whole=False)]) | timeline

    def closing(self) -> list[Json]:
        """Chunks that come after the last delta."""
        if not self.request.includes_usage:
            return []
        timeline = {"timeline": self._timeline} if self.request.timeline else {}
        return [self.wrap([]) | {"usage": usage_info(self.generation.usage)} | timeline]

    def whole(self, deltas: Mapping[int, list[Delta]]) -> Json:
        joined = {index: join(parts) for index, parts in sorted(deltas.items())}
        for index, delta in joined.items():
            self._note(index, delta)
        choices = [self.choice(index, delta, is_whole=True) for index, delta in joined.items()]
        usage = {"usage": usage_info(self.generation.usage)}
        timeline = {"timeline": self._timeline} if self.request.timeline else {}
        return self._envelope(self.whole_object, choices) | self.beside_choices() | usage | timeline

    def wrap(self, choices: list[Json]) -> dict[str, Any]:
        """One chunk of a stream."""
        chunk = self._envelope(self.chunk_object, choices)
        if self.request.includes_usage:
            chunk["usage"] = usage_info(self.generation.usage) if self.request.has_continuous_usage else None
        return chunk

    def _envelope(self, kind: str, choices: list[Json]) -> dict[str, Any]:
        """Under the name that the client used, alias or not."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }

    def _note(self, index: int, delta: Delta) -> None:
        if index == 0 and delta.timeline is not None:
            self._timeline = timeline_fields(delta.timeline)


@dataclass(frozen=True, slots=True)
class Dialect(Generic[Request]):
    """One endpoint: what it is asked, what that means, and how the answer is written."""

    endpoint: str
    """After /v1."""
    request: type[Request]
    count: Callable[[Request], int]
    """How many sequences a request holds. Raises InvalidRequest if too many."""
    sequences: Callable[[Request, Order], Awaitable[list[SequenceRequest]]]
    """Raises InvalidRequest, or Unavailable while no decode worker is ready."""
    answer: Callable[[Request, Generation, ServedModel, int], Answer[Request]]


async def collect(generation: Generation) -> dict[int, list[Delta]]:
    """Each sequence's deltas, when all have ended. Raises what `generation` raises."""
    deltas: defaultdict[int, list[Delta]] = defaultdict(list)
    while (item := await generation.next()) is not None:
        deltas[item[0]].append(item[1])
    return deltas


def usage_info(usage: Usage) -> UsageInfo:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timeline_fields(timeline: common_pb2.Timeline) -> Json:
    return {field.name: getattr(timeline, field.name) for field in timeline.DESCRIPTOR.fields}


def finite(logprob: float) -> float:
    return logprob if logprob > LOGPROB_MIN else LOGPROB_MIN
