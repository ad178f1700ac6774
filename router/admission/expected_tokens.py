"""How many tokens a request will generate: a guess from what its like have generated before."""

from collections.abc import Hashable

UNKNOWN_TOKENS = 256.0
"""Before anything has been seen."""
OF_LAST = 50
"""Requests or so that the mean is taken over: the newest weighs 1/50, and all alike while there are fewer."""


class ExpectedTokens:
    """Means by any key out of a closed set."""

    def __init__(self) -> None:
        self._means: dict[Hashable, tuple[int, float]] = {}

    def of(self, key: Hashable, max_tokens: int) -> int:
        """For one sequence that may generate `max_tokens`; at least 1."""
        _, mean = self._means.get(key, (0, UNKNOWN_TOKENS))
        return max(1, min(round(mean), max_tokens))

    def observe(self, key: Hashable, tokens: float) -> None:
        """One sequence generated so many."""
        seen, mean = self._means.get(key, (0, 0.0))
        seen = min(seen + 1, OF_LAST)
        self._means[key] = (seen, mean + (tokens - mean) / seen)
