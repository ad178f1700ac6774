"""/v1/completions: what is asked, as sequences; what comes, as OpenAI writes it."""

from collections import Counter
from typing import cast

from baton.errors import InvalidRequest
from baton.sampling import PositionLogprobs
from router.catalog import ServedModel
from router.frontend import Order
from router.generation import Generation
from router.http.answer import Answer, Dialect, finite
from router.http.openai_requests import PROMPTS_MAX, CompletionRequest
from router.http.openai_responses import CompletionChoice, CompletionLogprobs
from router.sequence import Delta, SequenceRequest

MAX_TOKENS_DEFAULT = 16
"""OpenAI's."""


class CompletionAnswer(Answer[CompletionRequest]):
    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, request: CompletionRequest, generation: Generation, served: ServedModel, created_s: int) -> None:
        super().__init__(request, generation, served, created_s)
        self._begun: set[int] = set()
        self._offsets: Counter[int] = Counter()
        """Where each choice's next token starts in its text."""

    @property
    def shows_tokens(self) -> bool:
        return bool(self.request.return_token_ids or self.request.echo) or self.request.logprobs is not None

    def choice(self, index: int, delta: Delta, *, is_whole: bool) -> CompletionChoice:
        del is_whole
        is_first = index not in self._begun
        self._begun.add(index)
        prompt = self.generation.sequences[index].request.prompt
        choice: CompletionChoice = {
            "index": index,
            "text": self._echo(index) + delta.text if is_first else delta.text,
            "logprobs": self._logprobs(index, delta, prompt if is_first else ()),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if is_first:
                choice["prompt_token_ids"] = list(prompt)
        return choice

    def _echo(self, index: int) -> str:
        if not self.request.echo:
            return ""
        prompt = _prompts(self.request)[index // self.request.choices]
        return prompt if isinstance(prompt, str) else self.served.prompts.decode(prompt)

    def _logprobs(self, index: int, delta: Delta, prompt: tuple[int, ...]) -> CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        tokens, positions = delta.token_ids, delta.logprobs
        if self.request.echo and prompt:
            tokens, positions = prompt + tokens, delta.prompt_logprobs + positions
        logprobs = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token, position in zip(tokens, positions, strict=True):
            text = self.served.prompts.decode([token])
            logprobs["tokens"].append(text)
            logprobs["text_offset"].append(self._offsets[index])
            logprobs["token_logprobs"].append(finite(position[0].logprob) if position else None)
            logprobs["top_logprobs"].append(self._alternatives(position))
            self._offsets[index] += len(text) if self._is_written(token) else 0
        return logprobs

    def _is_written(self, token: int) -> bool:
        """Whether the token is part of the choice's text; the special ones that the tokenizer adds are not."""
        return self.request.skip_special_tokens is False or not self.served.tokenizer.is_special(token)

    def _alternatives(self, position: PositionLogprobs) -> dict[str, float] | None:
        """The chosen token and the likeliest; None for a prompt's first token, which nothing predicts."""
        alternatives: dict[str, float] = {}
        for alternative in position:
            text = self.served.prompts.decode([alternative.token_id])
            alternatives.setdefault(text, finite(alternative.logprob))
        return alternatives or None


def _count(request: CompletionRequest) -> int:
    return len(_prompts(request)) * request.choices


async def _sequences(request: CompletionRequest, order: Order) -> list[SequenceRequest]:
    wants_output = request.max_tokens != 0
    template = SequenceRequest(
        prompt=(),
        sampling=request.sampling(
            max_tokens=request.max_tokens if wants_output else 1,
            logprobs=request.logprobs if wants_output else None,
            prompt_logprobs=request.logprobs if request.echo else None,
        ),
        stop=request.stop_strings,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        cache_salt=request.cache_salt or "",
        retention=request.retention,
        wants_output=wants_output,
    )
    prompts = [await _tokens(prompt, request, order) for prompt in _prompts(request)]
    return order.sequences(prompts, template, request.choices, MAX_TOKENS_DEFAULT)


def _prompts(request: CompletionRequest) -> list[str] | list[list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or isinstance(prompt[0], int):
        return [cast(list[int], prompt)]
    if len(prompt) > PROMPTS_MAX:
        raise InvalidRequest(f"prompt may hold {PROMPTS_MAX} prompts, not {len(prompt)}.", "prompt")
    return prompt


async def _tokens(prompt: str | list[int], request: CompletionRequest, order: Order) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await order.served.prompts.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
    return tuple(prompt)


COMPLETIONS = Dialect("/completions", CompletionRequest, _count, _sequences, CompletionAnswer)
