"""What requests to a model must keep to: its context and its vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.errors import InvalidRequest
from baton.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What every worker of the model can do, or less where this server or the tenant's terms allow less."""

    context_length: int
    """In tokens, prompt and completion together."""
    vocabulary_size: int
    limit: str = "the model's context"
    """What sets the context length, for sentences."""

    def limited(self, context_length_max: int, limit: str) -> "ModelFacts":
        """With that context if it is the smaller one; 0 stands for no limit."""
        if not 0 < context_length_max < self.context_length:
            return self
        return replace(self, context_length=context_length_max, limit=limit)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises InvalidRequest if the prompt is empty, does not fit, or holds ids that do not exist."""
        if not prompt:
            raise InvalidRequest("The prompt is empty; it must have at least one token.", "prompt")
        if len(prompt) >= self.context_length:
            raise InvalidRequest(
                f"The prompt has {len(prompt)} tokens, but {self.limit} is {self.context_length} tokens, "
                "prompt and completion together.",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= self.vocabulary_size:
            raise InvalidRequest(
                f"The prompt holds a token id outside the model's, which run from 0 to {self.vocabulary_size - 1}.",
                "prompt",
            )

    def complete(
        self, sampling: SamplingParams, prompt_tokens: int, seed: int, max_tokens_default: int | None = None
    ) -> SamplingParams:
        """With `max_tokens` and `seed` set; unasked, as many tokens as there is room for, or the default if less.

        Raises InvalidRequest if the prompt leaves less room than was asked for.
        """
        room = self.context_length - prompt_tokens
        default = room if max_tokens_default is None else min(room, max_tokens_default)
        max_tokens = default if sampling.max_tokens is None else sampling.max_tokens
        if max_tokens > room:
            raise InvalidRequest(
                f"{prompt_tokens + max_tokens} tokens were asked for, {prompt_tokens} in the prompt and {max_tokens} "
                f"to generate, but {self.limit} is {self.context_length} tokens.",
                "max_tokens",
            )
        sampling.check_vocabulary(self.vocabulary_size)
        return sampling.with_changes(max_tokens=max_tokens, seed=seed if sampling.seed is None else sampling.seed)
