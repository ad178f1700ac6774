"""How tokens are chosen: one request's sampling parameters, checked when built; and how likely they were."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baton.errors import InvalidRequest

LOGPROBS_MAX = 20
"""Alternatives a request may ask for at each position."""
STOP_TOKEN_IDS_MAX = 256
LOGIT_BIAS_MAX = 1024
"""Entries of each kind a request may carry."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Raises InvalidRequest, naming the parameter, when a value is out of its range.

    The same seed, prompt and parameters give the same tokens, whatever else runs and on
    whichever worker; `temperature=0` is greedy and needs no seed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """How many of the most likely tokens are kept; 0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    """None: up to the model's context length."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report at each generated position; None: no logprobs at all."""
    prompt_logprobs: int | None = None
    """The same for the prompt; such a request neither reads the prefix cache nor is prefilled
    apart, because every position's logits are needed in one place."""

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, must: str) -> None:
            if not holds:
                raise InvalidRequest(f"{name} must be {must}, not {getattr(self, name)!r}.", name)

        def in_range(name: str, low: float, high: float) -> None:
            check(name, low <= getattr(self, name) <= high, f"between {low:g} and {high:g}")

        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        in_range("temperature", 0, 100)
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("top_k", 0 <= self.top_k < 2**31, "-1, 0 (all tokens) or a positive number")
        in_range("min_p", 0, 1)
        check("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100")
        in_range("presence_penalty", -2, 2)
        in_range("frequency_penalty", -2, 2)
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        check("min_tokens", self.min_tokens >= 0, "0 or more")
        check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        check("seed", self.seed is None or 0 <= self.seed < 2**64, "between 0 and 2^64 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            check(name, asked is None or 0 <= asked <= LOGPROBS_MAX, f"between 0 and {LOGPROBS_MAX}")
        if len(self.stop_token_ids) > STOP_TOKEN_IDS_MAX:
            raise InvalidRequest(
                f"stop_token_ids may hold {STOP_TOKEN_IDS_MAX} ids, not {len(self.stop_token_ids)}.",
                "stop_token_ids",
            )
        if len(self.logit_bias) > LOGIT_BIAS_MAX:
            raise InvalidRequest(
                f"logit_bias may hold {LOGIT_BIAS_MAX} tokens, not {len(self.logit_bias)}.", "logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequest(
                    f"logit_bias of token {token} must be between -100 and 100, not {bias!r}.", "logit_bias"
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def with_changes(self, **changes: Any) -> "SamplingParams":
        return replace(self, **changes)

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Raises InvalidRequest when a token id named here does not exist."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocabulary_size:
                    raise InvalidRequest(
                        f"{name} names token {token}, but the model's ids run from 0 to {vocabulary_size - 1}.",
                        name,
                    )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float


PositionLogprobs = tuple[TokenLogprob, ...]
"""One position: the chosen (or prompt) token first, then the most likely ones, best first."""
