"""What transports show to Prometheus: how much they moved, how long that took, and what failed."""

from prometheus_client import CollectorRegistry, Counter

_LABELS = ("transport", "direction")


class TransferMetrics:
    """`direction` is "out" on the sending side and "in" on the receiving side. A one-sided transport (shm)
    is seen by its sender alone. Safe to use from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help_text: str) -> Counter:
            return Counter(f"baton_kv_transfer_{name}", help_text, _LABELS, registry=registry)

        self._connections = counter("connections", "Tickets connected, by the transport they got")
        self._bytes = counter("bytes", "Bytes of KV slices moved")
        self._writes = counter("writes", "Writes of slices moved")
        self._seconds = counter("seconds", "Time spent moving slices and waiting for fences")
        self._failures = counter("failures", "Connections refused, writes and fences that failed")

    def connected(self, transport: str, direction: str) -> None:
        self._connections.labels(transport, direction).inc()

    def moved(self, transport: str, direction: str, size_bytes: int, seconds: float) -> None:
        self._writes.labels(transport, direction).inc()
        self._bytes.labels(transport, direction).inc(size_bytes)
        self._seconds.labels(transport, direction).inc(seconds)

    def waited(self, transport: str, direction: str, seconds: float) -> None:
        self._seconds.labels(transport, direction).inc(seconds)

    def failed(self, transport: str, direction: str) -> None:
        self._failures.labels(transport, direction).inc()
