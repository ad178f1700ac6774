"""The OpenAI API's requests, checked as they are parsed.

Unknown fields are ignored, as OpenAI ignores them; a known one of the wrong type, NaN and infinity are not.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.errors import InvalidRequest
from baton.sampling import LOGPROBS_MAX, SamplingParams
from router.admission.request_class import RequestClass
from router.retention import NO_PROMISE, TTL_MAX_S, Retention
from router.text.stop_strings import check_stops

CHOICES_MAX = 128
PROMPTS_MAX = 2048
"""Continuations of a prompt, and prompts in a request, as in OpenAI's API."""

TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True)]
Prompt = Annotated[str | TokenIds | Texts | TokenIdLists, Field(union_mode="left_to_right")]

RESERVED_TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
    }
)
"""Arguments of whoever calls the template rather than of the template."""
_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "a string or a list of strings",
    "content": "a string or a list of text parts",
}
"""What to say of the fields that may have several types."""


_SAMPLED_AS_GIVEN = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos"),
)


_CLASSES: Mapping[str, RequestClass | None] = {
    "auto": None,
    "default": "standard",
    "flex": "batch",
    "scale": "standard",
    "priority": "interactive",
}
"""What OpenAI's service tiers stand for here."""


class OpenAIModel(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


class StreamOptions(OpenAIModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CacheOptions(BaseModel):
    """Ours alone, so a field that is not known is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    ttl_s: float | None = Field(None, gt=0, le=TTL_MAX_S, description="Keep the KV so long after its last use")
    pin: bool | None = Field(None, description="Keep the KV until the tenant's cache is cleared")


class GenerationRequest(OpenAIModel):
    """What completions and chat completions have in common; null means the default."""

    model: str | None = Field(None, description="Default: the one model that is served")
    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Texts | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(None, max_length=256)
    # Baton's
    timeline: bool | None = Field(None, description="Tell where the request's time went")
    cache: CacheOptions | None = Field(None, description="How long to keep the request's KV, within the tenant's quota")

    @property
    def request_class(self) -> RequestClass | None:
        """None: the tenant's own."""
        return None if self.service_tier is None else _CLASSES[self.service_tier]

    @property
    def retention(self) -> Retention:
        """As it is asked for."""
        return NO_PROMISE if self.cache is None else Retention(self.cache.ttl_s or 0.0, bool(self.cache.pin))

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def tokens_asked(self) -> int | None:
        """For one choice at most; None: the request does not say."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Raises InvalidRequest if there are too many, or one is empty."""
        return check_stops([self.stop] if isinstance(self.stop, str) else self.stop or [])

    def check(self) -> None:
        """Raises InvalidRequest for what the types alone do not tell."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options may only be given where stream is true.", "stream_options")

    def sampling(self, **others: Any) -> SamplingParams:
        """Raises InvalidRequest when a value is out of its range."""
        given = {name: value for name in _SAMPLED_AS_GIVEN if (value := getattr(self, name)) is not None}
        seed = None if self.seed is None else _unsigned(self.seed)
        return SamplingParams(
            **given,
            **others,
            seed=seed,
            logit_bias=_logit_bias(self.logit_bias or {}),
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MAX)

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise InvalidRequest("suffix is not supported: the models served here only continue text.", "suffix")
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequest("best_of must equal n: candidates that are not returned are not made.", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens may be 0 only where echo is true.", "max_tokens")


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """Fields beyond these reach the model's chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, hide_input_in_errors=True)

    role: str
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None


class ResponseFormat(OpenAIModel):
    type: str


class ChatCompletionRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MAX)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[str] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def generates_new_message(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    def check(self) -> None:
        super().check()
        self._check_unsupported()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs may only be given where logprobs is true.", "top_logprobs")
        if self.generates_new_message and self.continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other.", "continue_final_message"
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message needs a last message whose role is assistant.", "continue_final_message"
            )

    def _check_unsupported(self) -> None:
        if self.tools or self.functions:
            raise InvalidRequest("Tool calls are not supported by this server.", "tools" if self.tools else "functions")
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequest("Only the response format 'text' is supported by this server.", "response_format")
        if any(modality != "text" for modality in self.modalities or ()):
            raise InvalidRequest("Only the modality 'text' is supported by this server.", "modalities")
        if self.chat_template is not None:
            raise InvalidRequest("The chat template is the model's own and cannot be replaced.", "chat_template")
        if reserved := sorted(RESERVED_TEMPLATE_ARGUMENTS & (self.chat_template_kwargs or {}).keys()):
            raise InvalidRequest(f"chat_template_kwargs must not hold {reserved[0]}.", "chat_template_kwargs")


Request = TypeVar("Request", bound=GenerationRequest)


def parse_request(kind: type[Request], body: bytes) -> Request:
    """Raises InvalidRequest, naming the field, if the body is not such a request in JSON."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    request.check()
    return request


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid: {first['msg']}.")
    if not first["loc"]:
        return InvalidRequest("The body must be a JSON object.")
    if first["type"] == "missing":
        return InvalidRequest(f"{_path(first['loc'])} is missing.", _path(first["loc"]))
    for position, name in enumerate(first["loc"]):
        if name in _EXPECTED:
            path = _path(first["loc"][: position + 1])
            return InvalidRequest(f"{path} must be {_EXPECTED[str(name)]}.", path)
    return InvalidRequest(f"{_path(first['loc'])}: {first['msg']}.", _path(first["loc"]))


def _path(location: tuple[int | str, ...]) -> str:
    """As OpenAI writes it: messages[0].content."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")


def _unsigned(seed: int) -> int:
    """Clients may give a signed 64-bit seed; anything else is left for SamplingParams to refuse."""
    return seed + 2**64 if -(2**63) <= seed < 0 else seed


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise InvalidRequest("logit_bias must map token ids to numbers.", "logit_bias") from None
