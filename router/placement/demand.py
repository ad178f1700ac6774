"""What comes to a fleet: how often, how long, how much of it was cached. Averages over the last half minute or so."""

from math import exp

MEMORY_S = 30.0


class Demand:
    """Decaying sums; a rate is a sum over how long it has been gathered for."""

    __slots__ = ("_at_s", "_cached_tokens", "_context", "_gathered_s", "_pooled", "_tokens")

    def __init__(self, now_s: float) -> None:
        self._at_s, self._gathered_s = now_s, 0.0
        self._pooled = self._tokens = self._cached_tokens = self._context = 0.0

    def observe(self, now_s: float, tokens: int, cached_tokens: int, *, pooled: bool) -> None:
        """A request was placed, with so many prompt tokens to compute after those that are cached. `pooled`: by those
        whose work is to compute prompts."""
        self._decay(now_s)
        self._pooled += pooled
        self._tokens += tokens
        self._cached_tokens += cached_tokens
        self._context += tokens * (cached_tokens + tokens / 2)

    def _decay(self, now_s: float) -> None:
        elapsed_s = now_s - self._at_s
        if elapsed_s <= 0:
            return
        kept = exp(-elapsed_s / MEMORY_S)
        self._at_s = now_s
        self._gathered_s = self._gathered_s * kept + MEMORY_S * (1 - kept)
        self._pooled *= kept
        self._tokens *= kept
        self._cached_tokens *= kept
        self._context *= kept

    def pooled_per_s(self, now_s: float) -> float:
        """What came in the first moments says little about a rate: it counts as if spread over a second at least."""
        return self._pooled / max(self._gathered_s + now_s - self._at_s, 1.0)

    @property
    def mean_context(self) -> float:
        """Tokens that a computed one attends to."""
        return self._context / self._tokens if self._tokens else 0.0

    @property
    def reuse_chance(self) -> float:
        """The part of all prompt tokens that were in a cache: the chance that a block is asked for again, as far as
        the recent past tells."""
        tokens = self._tokens + self._cached_tokens
        return self._cached_tokens / tokens if tokens else 0.0
