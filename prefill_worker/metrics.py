"""What prefill workers show of their transfers to Prometheus."""

from prometheus_client import CollectorRegistry, Counter

from prefill_worker.job import TransferTimes


class SendMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help_text: str) -> Counter:
            return Counter(f"baton_kv_transfer_{name}_seconds", help_text, ("transport",), registry=registry)

        self._hidden = counter("hidden", "Time spent sending KV while its prompt was still computed")
        self._exposed = counter("exposed", "Time from a first token to the landing of its prompt's last KV")

    def sent(self, transport: str, times: TransferTimes) -> None:
        self._hidden.labels(transport).inc(times.hidden_s)
        self._exposed.labels(transport).inc(times.exposed_s)
