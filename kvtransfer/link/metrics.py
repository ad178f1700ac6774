"""What links show to Prometheus."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

Reason = Literal["unreachable", "timeout", "unauthorized", "refused"]


@dataclass(frozen=True, slots=True, eq=False)
class OpenLink:
    """One link, from when it is ready until it ends."""

    transport: str
    peer: str
    latency_s: float
    bytes_per_s: float
    is_slow: bool

    @property
    def speed(self) -> str:
        """For a log line."""
        return f"{self.bytes_per_s / 1e9:.2f} GB/s, {1e6 * self.latency_s:.0f} µs"


class LinkMetrics:
    """One worker's, of both ends. Lives on the loop. `peer` is the other worker's id; its series go with its link."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(f"baton_kv_link{name}", help_text, ("transport", *labels), registry=registry)

        def counter(name: str, help_text: str, label: str) -> Counter:
            return Counter(f"baton_kv_link_{name}", help_text, (label,), registry=registry)

        self._links = gauge("s", "Links to other workers now, by the transport they got", "speed")
        self._bandwidth = gauge("_bytes_per_second", "Of a link, as its self-test found it", "peer")
        self._latency = gauge("_latency_seconds", "Of a link: one small write and its fence, in the self-test", "peer")
        self._attempts = counter(
            "attempts", "Links that were begun; side: the one that receives blocks or sends them", "side"
        )
        self._failures = counter("failures", "Links that could not be made", "reason")
        self._tests_failed = counter("test_failures", "Self-tests of a transport that failed", "transport")
        self._open: defaultdict[tuple[str, str], list[OpenLink]] = defaultdict(list)
        """By transport and peer: two workers may be linked both ways."""

    def attempted(self, side: Literal["receive", "send"]) -> None:
        self._attempts.labels(side).inc()

    def failed(self, reason: Reason) -> None:
        self._failures.labels(reason).inc()

    def test_failed(self, transport: str) -> None:
        self._tests_failed.labels(transport).inc()

    def opened(self, link: OpenLink) -> None:
        self._links.labels(link.transport, _speed_label(link)).inc()
        self._open[link.transport, link.peer].append(link)
        self._show(link.transport, link.peer)

    def closed(self, link: OpenLink) -> None:
        self._links.labels(link.transport, _speed_label(link)).dec()
        self._open[link.transport, link.peer].remove(link)
        self._show(link.transport, link.peer)

    def _show(self, transport: str, peer: str) -> None:
        """The last link that is left."""
        if links := self._open[transport, peer]:
            self._bandwidth.labels(transport, peer).set(links[-1].bytes_per_s)
            self._latency.labels(transport, peer).set(links[-1].latency_s)
        else:
            del self._open[transport, peer]
            self._bandwidth.remove(transport, peer)
            self._latency.remove(transport, peer)


def _speed_label(link: OpenLink) -> str:
    return "slow" if link.is_slow else "expected"
