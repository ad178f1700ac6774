"""What a worker's tiers show to Prometheus: how full they are, what was found in them, what moves."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.errors import Overloaded, Unavailable
from engine.interface import Engine, EngineStats
from engine.thread import EngineThread
from engine.worker.cache_admin import CacheReport, hit_tokens, report_of
from kvcache.tiers.interface import RestoreTiming, TierState

E = TypeVar("E", bound=Engine)
PERIOD_S = 1.0


class TierMetrics(Collector):
    """The tiers are the engine's thread's, so what is shown of them is the last report, and never waits for one."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._report = CacheReport(EngineStats(), ())
        self._restored_bytes, self._restore_s = (
            Counter(f"baton_kv_tier_restore{name}", help_text, ("tier",), registry=registry)
            for name, help_text in (
                ("d_bytes", "KV brought up into the pool"),
                ("_seconds", "Time that moving it up took by itself"),
            )
        )
        registry.register(self)

    def reported(self, report: CacheReport) -> None:
        self._report = report

    def restored(self, timing: RestoreTiming) -> None:
        self._restored_bytes.labels(timing.tier).inc(timing.size_bytes)
        self._restore_s.labels(timing.tier).inc(timing.seconds)

    def collect(self) -> Iterator[Metric]:
        report, stats = self._report, self._stats()
        states = report.tiers
        yield _gauge("blocks", "KV blocks in a tier", states, lambda state: state.blocks)
        yield _gauge("bytes", "Memory that they take", states, lambda state: state.size_bytes)
        yield _gauge("capacity_bytes", "What a tier may hold", states, lambda state: state.size_bytes_max)
        yield _gauge("retained_bytes", "Under a time to live or a pin", states, lambda state: state.retained_bytes)
        yield _gauge(
            "off", "1: the tier was turned off because it failed", states, lambda state: bool(state.off_reason)
        )
        yield _counter(
            "hits_tokens", "Prompt tokens found in a tier", states, lambda state: hit_tokens(stats, state.tier)
        )
        below = [state for state in states if state.tier != "hbm"]
        yield _counter("stored_bytes", "KV that came down into a tier", below, lambda state: state.stored_bytes)
        yield _counter("store_seconds", "Time that moving it down took by itself", below, lambda state: state.stored_s)
        yield _gauge("arriving_bytes", "KV on its way down into it", below, lambda state: state.arriving_bytes)
        for name, help_text, value in (
            ("baton_kv_dropped_blocks", "KV blocks whose last copy here was given up", report.dropped_blocks),
            ("baton_kv_corrupt_blocks", "Restored KV blocks that did not match their digests", report.corrupt_blocks),
            ("baton_recomputed_tokens", "Computed again by preempted sequences", stats.recomputed_tokens),
        ):
            yield CounterMetricFamily(name, help_text, value=value)


async def watch(engine: EngineThread[E], metrics: TierMetrics) -> None:
    """Asks for a report again and again, until the engine is gone."""
    while True:
        await asyncio.sleep(PERIOD_S)
        try:
            metrics.reported(await engine.call(report_of))
        except Overloaded:
            continue
        except Unavailable:
            return


Value = Callable[[TierState], float]


def _gauge(name: str, help_text: str, states: Sequence[TierState], value: Value) -> Metric:
    return _filled(GaugeMetricFamily(f"baton_kv_tier_{name}", help_text, labels=["tier"]), states, value)


def _counter(name: str, help_text: str, states: Sequence[TierState], value: Value) -> Metric:
    return _filled(CounterMetricFamily(f"baton_kv_tier_{name}", help_text, labels=["tier"]), states, value)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, states: Sequence[TierState], value: Value
) -> GaugeMetricFamily | CounterMetricFamily:
    for state in states:
        family.add_metric([state.tier], value(state))
    return family
