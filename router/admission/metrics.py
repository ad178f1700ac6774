"""What admission measures. Every label's value comes from a closed set, the settings or the tenants' file."""

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.admission.request_class import RequestClass

_WAIT_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
RefusalReason = Literal[
    "places",  # all of requests_max are taken
    "queue_full",
    "displaced",  # waited, and gave way to one more urgent or of a tenant with fewer
    "deadline",  # would not have had its turn in time
    "expired",  # its deadline passed while it waited
    "no_worker",
    "rate",  # the tenant's tokens per minute
    "concurrency",  # the tenant's requests_max
    "closed",
]


class AdmissionMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._waiting = Gauge(
            "baton_queue_requests", "Requests waiting for their turn", ["model", "class"], registry=registry
        )
        self._wait_s = Histogram(
            "baton_queue_wait_seconds",
            "From asking for a turn until having it",
            ["model", "class"],
            buckets=_WAIT_S,
            registry=registry,
        )
        self._refused = Counter(
            "baton_requests_refused", "Requests that were not admitted", ["reason", "tenant"], registry=registry
        )
        self._used: dict[str, Counter] = {}
        """`_tokens` by tenant: looking it up there takes longer than counting."""
        self._tokens = Counter(
            "baton_tenant_tokens", "Tokens that tenants used, prompt and completion", ["tenant"], registry=registry
        )
        self.bucket_fallback = Gauge(
            "baton_tenant_limits_local", "1 while Redis is away and each router limits by its share", registry=registry
        )
        self.tenants_file_unusable = Gauge(
            "baton_tenants_file_unusable", "1 while the tenants' file has changed and cannot be used", registry=registry
        )

    def watch_queue(self, model: str, request_class: RequestClass, length: Callable[[], float]) -> None:
        """Asked when metrics are read."""
        self._waiting.labels(model, request_class).set_function(length)

    def wait_s(self, model: str, request_class: RequestClass) -> Histogram:
        """To be kept: looking it up takes longer than observing."""
        return self._wait_s.labels(model, request_class)

    def refused(self, reason: RefusalReason, tenant: str = "") -> None:
        """No tenant: refused before it was asked for."""
        self._refused.labels(reason, tenant).inc()

    def used(self, tenant: str, tokens: int) -> None:
        if tenant not in self._used:
            self._used[tenant] = self._tokens.labels(tenant)
        self._used[tenant].inc(tokens)
