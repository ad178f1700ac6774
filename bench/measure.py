"""From the arrival times of streams to the figures of a benchmark. Pure."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream that brought tokens."""

    arrival_s: float
    tokens: int | None
    """None: the server does not say."""


@dataclass(frozen=True, slots=True)
class Completed:
    """One request that was answered in full; all times on one clock."""

    start_s: float
    end_s: float
    chunks: tuple[Chunk, ...]
    """At least one."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.chunks[0].arrival_s - self.start_s

    @property
    def end_to_end_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def token_gaps(self) -> list[float]:
        """Seconds before each token after those of the first chunk: a chunk of n tokens that comes t after
        the one before it counts as n gaps of t / n."""
        gaps = []
        counts = chunk_tokens(self.chunks, self.output_tokens)
        for (before, chunk), tokens in zip(pairwise(self.chunks), counts[1:], strict=True):
            gaps += [(chunk.arrival_s - before.arrival_s) / tokens] * tokens
        return gaps


@dataclass(frozen=True, slots=True)
class Failed:
    reason: str


Outcome = Completed | Failed


def chunk_tokens(chunks: Sequence[Chunk], output_tokens: int) -> list[int]:
    """How many tokens each chunk brought: as the server said, else spread evenly, at least one each."""
    said = [chunk.tokens for chunk in chunks if chunk.tokens is not None]
    if len(said) == len(chunks):
        return said
    each, more = divmod(max(output_tokens, len(chunks)), len(chunks))
    return [each + (i < more) for i in range(len(chunks))]


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of them do not exceed (nearest rank); None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one level of concurrency showed. Times are None where no request was answered."""

    concurrency: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    output_tokens_per_s: float
    input_tokens_per_s: float
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    gap_p99_s: float | None
    """Between chunks, however many tokens they hold: the wait that a reader sees."""
    tokens_per_chunk: float
    requests: int
    failures: int
    output_tokens: int
    cached_tokens: int
    duration_s: float
    """From the first request's start until the last one's end."""
    client_cpu_share: float
    """Of one core, spent by the load generator itself."""
    errors: dict[str, int] = field(default_factory=dict)
    """Failures by reason."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(concurrency: int, outcomes: Sequence[Outcome], client_cpu_s: float) -> Figures:
    """Percentiles are over all tokens (ITL) or requests (TTFT, end to end) of the level; rates are tokens of
    answered requests over its duration."""
    done = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    duration_s = max((c.end_s for c in done), default=0.0) - min((c.start_s for c in done), default=0.0)
    ttfts = [c.ttft_s for c in done]
    ends = [c.end_to_end_s for c in done]
    token_gaps = [gap for c in done for gap in c.token_gaps]
    chunk_gaps = [b.arrival_s - a.arrival_s for c in done for a, b in pairwise(c.chunks)]
    output_tokens = sum(c.output_tokens for c in done)

    def per_s(amount: float) -> float:
        return amount / duration_s if duration_s > 0 else 0.0

    return Figures(
        concurrency=concurrency,
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        itl_p50_s=percentile(token_gaps, 50),
        itl_p99_s=percentile(token_gaps, 99),
        output_tokens_per_s=per_s(output_tokens),
        input_tokens_per_s=per_s(sum(c.input_tokens for c in done)),
        e2e_p50_s=percentile(ends, 50),
        e2e_p99_s=percentile(ends, 99),
        gap_p99_s=percentile(chunk_gaps, 99),
        tokens_per_chunk=output_tokens / max(1, sum(len(c.chunks) for c in done)),
        requests=len(outcomes),
        failures=len(failed),
        output_tokens=output_tokens,
        cached_tokens=sum(c.cached_tokens for c in done),
        duration_s=duration_s,
        client_cpu_share=per_s(client_cpu_s),
        errors=dict(Counter(f.reason for f in failed)),
    )
