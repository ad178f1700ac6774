"""What the latency model shows to Prometheus: its coefficients, and how far off its predictions are."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.latency import TIERS, WorkerLatency
from engine.interface import StepTiming
from kvcache.tiers.interface import RestoreTiming

_RATIO = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10)


class LatencyMetrics(Collector):
    """A step is compared with what was predicted for it right before it was learned from."""

    def __init__(
        self, registry: CollectorRegistry, role: str, model: str, latency: Callable[[], WorkerLatency]
    ) -> None:
        self._labels, self._latency = {"role": role, "model": model}, latency
        ratio = Histogram(
            "baton_latency_prediction_error_ratio",
            "What was measured, over what was predicted, of steps that prefill, of others, of transfers of KV, and "
            "of restores from each tier",
            [*self._labels, "quantity"],
            buckets=_RATIO,
            registry=registry,
        )
        self._prefill, self._decode, self._transfer = (
            ratio.labels(role, model, quantity) for quantity in ("prefill", "decode", "transfer")
        )
        self._restore = {tier: ratio.labels(role, model, f"restore_{tier}") for tier in TIERS if tier != "hbm"}
        registry.register(self)

    def measured_step(self, timing: StepTiming) -> None:
        predicted_s = self._latency().step_time_s(timing.work)
        _observe(self._prefill if timing.work.new_tokens else self._decode, timing.duration_s, predicted_s)

    def measured_transfer(self, size_bytes: int, seconds: float) -> None:
        _observe(self._transfer, seconds, self._latency().transfer.time_s(size_bytes))

    def measured_restore(self, timing: RestoreTiming) -> None:
        if known := self._latency().restore.get(timing.tier):
            _observe(self._restore[timing.tier], timing.seconds, known.time_s(timing.size_bytes))

    def collect(self) -> Iterator[Metric]:
        latency = self._latency()
        seconds = GaugeMetricFamily(
            "baton_latency_coefficient_seconds",
            "Of the latency model, as fitted to what this worker measured",
            labels=[*self._labels, "coefficient"],
        )
        for coefficient, value in _coefficients(latency).items():
            seconds.add_metric([*self._labels.values(), coefficient], value)
        yield seconds
        restore = GaugeMetricFamily(
            "baton_latency_restore_bytes_per_second", "Of each tier, as fitted", labels=[*self._labels, "tier"]
        )
        for tier, cost in latency.restore.items():
            restore.add_metric([*self._labels.values(), tier], cost.bytes_per_s)
        yield restore
        bandwidth = GaugeMetricFamily(
            "baton_latency_transfer_bytes_per_second", "Of KV between workers, as fitted", labels=list(self._labels)
        )
        bandwidth.add_metric(list(self._labels.values()), latency.transfer.bytes_per_s)
        yield bandwidth


def _observe(ratio: Histogram, measured_s: float, predicted_s: float) -> None:
    if predicted_s > 0:
        ratio.observe(measured_s / predicted_s)


def _coefficients(latency: WorkerLatency) -> dict[str, float]:
    return {
        "prefill_chunk": latency.prefill.chunk_s,
        "prefill_token": latency.prefill.token_s,
        "prefill_token_context": latency.prefill.token_context_s,
        "decode_step": latency.decode.step_s,
        "decode_sequence": latency.decode.sequence_s,
        "decode_kv_token": latency.decode.kv_token_s,
        "transfer": latency.transfer.latency_s,
        **{f"restore_{tier}": cost.latency_s for tier, cost in latency.restore.items()},
    }
