"""What fetches from other workers show to Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from baton.errors import DeadlineExceeded
from kvtransfer.fetch.client import FetchCancelled, Fetched

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class PrefetchMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = 0
        """Fetched, since the start."""
        self._fetches = Counter(
            "baton_kv_fetches",
            "Fetches of prefixes from other workers: complete, partial (the other had no more), missed (it had "
            "nothing), late, cancelled, unsettled (its end is not known) or failed",
            ("outcome",),
            registry=registry,
        )
        self._tokens = Counter("baton_kv_fetched_tokens", "Prompt tokens got from other workers", registry=registry)
        self._bytes = Counter("baton_kv_fetched_bytes", "KV got from other workers by name", registry=registry)
        self._seconds = Histogram(
            "baton_kv_fetch_duration_seconds",
            "From reserving to the end of a fetch",
            buckets=_SECONDS,
            registry=registry,
        )

    def ended(self, fetched: Fetched, wanted: int, tokens: int, seconds: float) -> None:
        """Of `wanted` blocks."""
        self.tokens += tokens
        self._tokens.inc(tokens)
        self._bytes.inc(fetched.transfer_bytes)
        self._seconds.observe(seconds)
        self._fetches.labels(_outcome(fetched, wanted)).inc()


def _outcome(fetched: Fetched, wanted: int) -> str:
    if fetched.settling is not None:
        return "unsettled"
    match fetched.error:
        case None if fetched.blocks == wanted:
            return "complete"
        case None:
            return "partial" if fetched.blocks else "missed"
        case DeadlineExceeded():
            return "late"
        case FetchCancelled():
            return "cancelled"
        case _:
            return "failed"
