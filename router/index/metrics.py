"""What the prefix index says about itself."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router.index.feed import IndexFeed
from router.index.prefix_index import Doubt, PrefixIndex


class IndexCollector(Collector):
    """Read when asked for; costs nothing otherwise."""

    def __init__(self, index: PrefixIndex, feed: IndexFeed) -> None:
        self._index, self._feed = index, feed

    def collect(self) -> Iterator[Metric]:
        yield _gauge("blocks", "KV blocks that the prefix index knows", len(self._index))
        yield _gauge("bytes", "Memory that the prefix index takes", self._index.size_bytes)
        yield _gauge("stale_seconds", "How long the worker stale for longest has been", self._feed.stale_s)
        yield self._stale_workers()
        counts = self._feed.counts
        yield _counter("event_batches", "Batches of KV events applied in their order", counts.event_batches)
        yield _counter("event_blocks", "Blocks that these batches told of", counts.event_blocks)
        yield _counter("gaps", "Times that KV events were missing", counts.gaps)
        yield _counter("redis_outages", "Times that KV events could not be read from Redis", counts.outages)
        snapshots = CounterMetricFamily(
            "baton_prefix_index_snapshots", "Snapshots of workers' caches asked for", labels=["outcome"]
        )
        snapshots.add_metric(["restored"], counts.snapshots)
        snapshots.add_metric(["failed"], counts.snapshot_failures)
        yield snapshots

    def _stale_workers(self) -> Metric:
        family = GaugeMetricFamily(
            "baton_prefix_index_stale_workers", "Workers whose blocks may be others than known", labels=["reason"]
        )
        stale = self._index.stale().values()
        for doubt in Doubt:
            label = doubt.name.lower()
            family.add_metric([label], sum(doubt in freshness.doubts for freshness in stale))
        return family


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"baton_prefix_index_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"baton_prefix_index_{name}", what, value=value)
