"""What fetches from other workers show to Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from baton.errors import DeadlineExceeded
from kvtransfer.fetch.client import FetchCancelled, Fetched, NoLink

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class PrefetchMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = 0
        """Fetched, since the start."""
        self._fetches = Counter(
            "baton_kv_fetches",
            "Fetches of prefixes from other workers: complete, partial (the other had no more), missed (it had "
            "nothing), late, cancelled, unsettled (its end is not known), no_link (none was begun for want of one) or "
            "failed",
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

    def had_no_link(self) -> None:
        """So none was begun."""
        self._fetches.labels("no_link").inc()

    def ended(self, fetched: Fetched, wanted: int, tokens: int, seconds: float, is_late: bool) -> None:
        """Of `wanted` blocks; `is_late` if it was taken back for that reason."""
        self.tokens += tokens
        self._tokens.inc(tokens)
        self._bytes.inc(fetched.transfer_bytes)
        self._seconds.observe(seconds)
        self._fetches.labels(_outcome(fetched, wanted, is_late)).inc()


def _outcome(fetched: Fetched, wanted: int, is_late: bool) -> str:
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
            return "late" if is_late else "cancelled"
        case NoLink():
            return "no_link"
        case _:
            return "failed"
