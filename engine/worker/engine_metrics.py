"""What an engine shows to Prometheus, read from its own statistics when asked."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.interface import EngineStats

_GAUGES = {
    "baton_running_sequences": ("Sequences in the running batch", "running_sequences"),
    "baton_waiting_sequences": ("Sequences that wait for blocks or a place in the batch", "waiting_sequences"),
    "baton_waiting_tokens": ("Prompt tokens still to compute", "waiting_tokens"),
    "baton_kv_blocks_used": ("KV blocks held by a request", "kv_blocks_used"),
    "baton_kv_blocks_cached": ("KV blocks held by nobody, with a reusable prefix", "kv_blocks_cached"),
    "baton_kv_blocks_total": ("KV blocks in the pool", "kv_blocks_total"),
}
_COUNTERS = {
    "baton_prefix_cache_queries_tokens": ("Prompt tokens looked up in the prefix cache", "prefix_queries_tokens"),
    "baton_prefix_cache_hits_tokens": ("Prompt tokens found in the prefix cache", "prefix_hits_tokens"),
    "baton_preemptions": ("Sequences whose blocks were taken for others", "preemptions"),
    "baton_engine_steps": ("Batches computed", "steps"),
}


class EngineMetrics(Collector):
    def __init__(self, registry: CollectorRegistry, role: str, model: str, stats: Callable[[], EngineStats]) -> None:
        self._labels, self._stats = {"role": role, "model": model}, stats
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (help_text, field) in _GAUGES.items():
            yield self._filled(GaugeMetricFamily(name, help_text, labels=list(self._labels)), getattr(stats, field))
        for name, (help_text, field) in _COUNTERS.items():
            yield self._filled(CounterMetricFamily(name, help_text, labels=list(self._labels)), getattr(stats, field))

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric(list(self._labels.values()), value)
        return family
