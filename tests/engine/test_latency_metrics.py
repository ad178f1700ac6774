import pytest
from prometheus_client import CollectorRegistry

from baton.latency import DecodeCost, PrefillCost, StepWork, TransferCost, WorkerLatency
from engine.interface import StepTiming
from engine.worker.latency_metrics import LatencyMetrics

LATENCY = WorkerLatency(PrefillCost(1.0, 0.5, 0.25), DecodeCost(2.0, 0.125, 0.0625), TransferCost(0.5, 100.0))
SLOWER = WorkerLatency(PrefillCost(2.0, 0.5, 0.25), DecodeCost(4.0, 0.125, 0.0625), TransferCost(1.5, 50.0))
LABELS = {"role": "decode", "model": "m"}
RATIO = "baton_latency_prediction_error_ratio"


class Shown:
    """What Prometheus sees of one worker, whose latency model a test can change."""

    def __init__(self) -> None:
        self.registry, self.latency = CollectorRegistry(), LATENCY
        self.metrics = LatencyMetrics(self.registry, "decode", "m", lambda: self.latency)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {**LABELS, **labels})

    def ratios(self, quantity: str) -> tuple[float | None, float | None]:
        """How many, and their sum."""
        return self.value(f"{RATIO}_count", quantity=quantity), self.value(f"{RATIO}_sum", quantity=quantity)


def test_coefficients_are_shown_as_they_are_now() -> None:
    shown = Shown()
    name = "baton_latency_coefficient_seconds"
    assert shown.value(name, coefficient="prefill_chunk") == 1.0
    assert shown.value(name, coefficient="decode_kv_token") == 0.0625
    assert shown.value("baton_latency_transfer_bytes_per_second") == 100.0
    shown.latency = SLOWER
    assert shown.value(name, coefficient="prefill_chunk") == 2.0
    assert shown.value(name, coefficient="transfer") == 1.5
    assert shown.value("baton_latency_transfer_bytes_per_second") == 50.0


@pytest.mark.parametrize(
    ("quantity", "work"),
    [
        ("decode", StepWork(sequences=8, kv_tokens=16)),
        ("prefill", StepWork(new_tokens=4, token_context=8.0)),
        ("prefill", StepWork(8, 16, 4, 8.0)),
    ],
)
def test_a_step_is_compared_with_its_prediction(quantity: str, work: StepWork) -> None:
    shown = Shown()
    shown.metrics.measured_step(StepTiming(work, 3 * LATENCY.step_time_s(work)))
    shown.metrics.measured_step(StepTiming(work, LATENCY.step_time_s(work) / 2))
    assert shown.ratios(quantity) == (2, pytest.approx(3.5))
    assert all(shown.ratios(other) == (0, 0) for other in {"prefill", "decode", "transfer"} - {quantity})


def test_a_transfer_is_compared_with_its_prediction() -> None:
    shown = Shown()
    shown.metrics.measured_transfer(50, 2.0)
    assert shown.ratios("transfer") == (1, pytest.approx(2.0))


def test_a_prediction_within_five_per_cent_has_a_bucket_of_its_own() -> None:
    shown = Shown()
    work = StepWork(sequences=8, kv_tokens=16)
    for ratio in (0.94, 0.96, 1.0, 1.04, 1.06):
        shown.metrics.measured_step(StepTiming(work, ratio * LATENCY.step_time_s(work)))
    counts = [shown.value(f"{RATIO}_bucket", quantity="decode", le=bound) for bound in ("0.95", "1.05", "1.1")]
    assert counts == [1, 4, 5]


def test_a_worker_that_claims_to_take_no_time_is_not_divided_by() -> None:
    shown = Shown()
    shown.latency = WorkerLatency(PrefillCost(0, 0, 0), DecodeCost(0, 0, 0), TransferCost(0, 1.0))
    shown.metrics.measured_step(StepTiming(StepWork(1, 1), 1.0))
    assert shown.ratios("decode") == (0, 0)
