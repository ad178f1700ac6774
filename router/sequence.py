"""One sequence from tokens to text: detokenizes, applies stop strings, counts. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from baton.rpc import common_pb2, worker_pb2
from baton.rpc.convert import logprobs_from_proto
from baton.sampling import PositionLogprobs, SamplingParams
from router.retention import NO_PROMISE, Retention
from router.text.detokenizer import Detokenizer
from router.text.stop_strings import Scanned, StopStrings

FinishReason = Literal["stop", "length"]
_FINISH_REASONS: dict[int, FinishReason] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One continuation of one prompt, checked and ready to be placed."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    """`seed` and `max_tokens` are set."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Whether what stopped the text, string or token, is part of it."""
    skip_special_tokens: bool = True
    continues_prompt: bool = True
    """Whether the text goes on where the prompt's ends, rather than being a message of its own."""
    cache_salt: str = ""
    retention: Retention = NO_PROMISE
    choice: int = 0
    """Which of its prompt's continuations this is."""
    wants_output: bool = True
    """False: only the prompt's logprobs are asked for, and the one token that has to be made is dropped."""


class Delta(NamedTuple):
    """What one engine step added to a sequence."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    """As many as token_ids where asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the text; None for the model's own end."""
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    timeline: common_pb2.Timeline | None = None
    """With the finish reason, where the worker gave one."""


class SequenceProgress:
    """How far one sequence is, on whichever workers."""

    def __init__(self, request: SequenceRequest, detokenizer: Detokenizer) -> None:
        self.request = request
        self.generated: list[int] = []
        """All tokens that workers sent, those included whose text is held back or was not asked for."""
        self.completion_tokens = 0
        self.cached_tokens = 0
        """Of the prompt, where it was computed first."""
        self.is_finished = False
        self._is_resumed = False
        self._timeline: common_pb2.Timeline | None = None
        """The last one told: a text that a stop string ends has none of its end."""
        self._detokenizer = detokenizer
        self._stop = StopStrings(request.stop, include_stop=request.include_stop)

    @property
    def has_started(self) -> bool:
        return bool(self.generated)

    @property
    def tokens_max(self) -> int:
        """That it may still generate."""
        assert self.request.sampling.max_tokens is not None
        return self.request.sampling.max_tokens - len(self.generated)

    def resume(self) -> SamplingParams:
        """How another worker is to go on from `generated`; what was delivered once is not asked for again."""
        self._is_resumed = self.has_started
        sampling = self.request.sampling
        return sampling.with_changes(prompt_logprobs=None) if self._is_resumed else sampling

    def take(self, output: worker_pb2.TokenOutput) -> Delta:
        """`output` is no error. After one with a finish reason, or the stop string, none may follow."""
        assert not self.is_finished
        token_ids = tuple(output.token_ids)
        self.generated += token_ids
        if not self._is_resumed:
            self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.HasField("timeline"):
            self._timeline = common_pb2.Timeline()
            self._timeline.CopyFrom(output.timeline)  # itself it would keep its whole message in memory
        reason = _FINISH_REASONS.get(output.finish_reason) or self._own_ending()
        if not self.request.wants_output:
            token_ids, reason = (), reason and "length"
        text, taken, stop_string = self._read(token_ids, reason)
        self.completion_tokens += taken
        self.is_finished = reason is not None or stop_string is not None
        return Delta(
            text,
            token_ids[:taken],
            _logprobs(output.logprobs[:taken]) if output.logprobs else (),
            "stop" if stop_string is not None else reason,
            stop_string if stop_string is not None else self._stop_token(token_ids, reason),
            _logprobs(output.prompt_logprobs) if output.prompt_logprobs else (),
            self._timeline if self.is_finished else None,
        )

    def _own_ending(self) -> FinishReason | None:
        """What the tokens themselves say, so that no worker is asked to go on after the last of them."""
        if not self.generated:
            return None
        if self.generated[-1] in self.request.sampling.stop_token_ids:
            return "stop"
        return None if self.tokens_max > 0 else "length"

    def _read(self, token_ids: tuple[int, ...], reason: FinishReason | None) -> tuple[str, int, str | None]:
        """The new text, how many tokens made it, and the stop string that ended it."""
        text = ""
        spoken = token_ids[:-1] if reason == "stop" and not self.request.include_stop else token_ids
        for count, token in enumerate(spoken, 1):
            piece = self._detokenizer.feed(token)
            if not self.request.stop:
                text += piece
                continue
            scanned = self._scan(piece, self.completion_tokens + count)
            text += scanned.text
            if scanned.matched is not None:
                return text, count, scanned.matched
        if reason is not None:
            text += self._stop.flush() + self._detokenizer.flush()
        return text, len(token_ids), None

    def _scan(self, piece: str, completion_tokens: int) -> Scanned:
        """Text that the first `min_tokens` tokens make is not searched, as in vLLM."""
        is_early = completion_tokens <= self.request.sampling.min_tokens
        return Scanned(piece) if is_early else self._stop.feed(piece)

    def _stop_token(self, token_ids: tuple[int, ...], reason: FinishReason | None) -> int | None:
        if reason == "stop" and token_ids and token_ids[-1] in self.request.sampling.stop_token_ids:
            return token_ids[-1]
        return None


def _logprobs(positions: Iterable[common_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(map(logprobs_from_proto, positions))


def join(deltas: Iterable[Delta]) -> Delta:
    """A whole sequence as if it had come in one step."""
    parts = list(deltas)
    last = parts[-1]
    return Delta(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.token_ids),
        tuple(position for part in parts for position in part.logprobs),
        last.finish_reason,
        last.stop_reason,
        parts[0].prompt_logprobs,
        last.timeline,
    )
