"""What the router measures, under the names that dashboards in the field know."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.cluster.worker_info import WorkerInfo

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_DECISION_S = (0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_RATIO = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10)


class RouterMetrics:
    """Every label value comes from a closed set or the settings, never from a request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "baton_requests", "Requests answered", ["model", "protocol", "endpoint", "code"], registry=registry
        )
        self._families = _Families(registry)

    def of(self, model: str) -> "ModelMetrics":
        """One model's, with all labels set: nothing is looked up for a token."""
        return ModelMetrics(self._families, model)

    def answered(self, model: str, protocol: str, endpoint: str, code: str) -> None:
        """`model` is empty for what concerns no model that is served here."""
        self._requests.labels(model, protocol, endpoint, code).inc()


class _Families:
    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, what: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, what, ["model", *labels], buckets=tuple(buckets), registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, ["model", *labels], registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, ["model"], registry=registry)

        self.time_to_first_token_s = histogram(
            "baton_time_to_first_token_seconds", "A request's arrival until its first token", _TTFT_S
        )
        self.inter_token_latency_s = histogram(
            "baton_inter_token_latency_seconds", "One token of a sequence until its next", _ITL_S
        )
        self.e2e_latency_s = histogram(
            "baton_e2e_request_latency_seconds", "A request's arrival until its last token", _E2E_S
        )
        self.prompt_tokens = counter("baton_prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("baton_cached_tokens", "Tokens of prompts that were in a prefix cache")
        self.generation_tokens = counter("baton_generation_tokens", "Tokens generated")
        self.running = gauge("baton_requests_running", "Sequences between their first token and their last")
        self.waiting = gauge("baton_requests_waiting", "Sequences placed and without a token yet")
        self.retries = counter("baton_placement_retries", "Sequences placed again because a worker failed them")
        self.placements = counter("baton_placements", "Sequences placed, on a pair or on a decode worker alone", "kind")
        self.fetches = counter(
            "baton_placement_fetches", "Sequences placed where a prefix is to be fetched from another worker first"
        )
        self.decision_s = histogram("baton_placement_decision_seconds", "Time that a placement took", _DECISION_S)
        self.prediction_error_ratio = histogram(
            "baton_placement_prediction_error_ratio", "What was measured, over what was predicted", _RATIO, "quantity"
        )
        self.upstream_requests = counter("baton_upstream_requests", "Requests sent to the model's upstream", "code")


class ModelMetrics:
    def __init__(self, families: _Families, model: str) -> None:
        self.time_to_first_token_s = families.time_to_first_token_s.labels(model)
        self.inter_token_latency_s = families.inter_token_latency_s.labels(model)
        self.e2e_latency_s = families.e2e_latency_s.labels(model)
        self.prompt_tokens = families.prompt_tokens.labels(model)
        self.cached_tokens = families.cached_tokens.labels(model)
        self.generation_tokens = families.generation_tokens.labels(model)
        self.running = families.running.labels(model)
        self.waiting = families.waiting.labels(model)
        self.retries = families.retries.labels(model)
        """Failovers, whether tokens had come or not."""
        self.placements_pair = families.placements.labels(model, "pair")
        self.placements_local = families.placements.labels(model, "local")
        self.placements_fetching = families.fetches.labels(model)
        self.decision_s = families.decision_s.labels(model)
        self.ttft_error_ratio = families.prediction_error_ratio.labels(model, "ttft")
        self.itl_error_ratio = families.prediction_error_ratio.labels(model, "itl")
        self._model, self._upstream_requests = model, families.upstream_requests

    def sent_upstream(self, code: str) -> None:
        """`code` is the upstream's HTTP status, or how it failed."""
        self._upstream_requests.labels(self._model, code).inc()


class WorkerCollector(Collector):
    """The members' load as of their last heartbeat; a worker that left leaves no series behind."""

    def __init__(self, workers: Callable[[], Iterable[WorkerInfo]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        labels = ["worker", "role", "model", "pool"]
        usage = GaugeMetricFamily("baton_worker_kv_cache_usage_ratio", "KV blocks held, of all", labels=labels)
        running = GaugeMetricFamily("baton_worker_running_sequences", "Sequences running", labels=labels)
        waiting = GaugeMetricFamily("baton_worker_waiting_sequences", "Sequences waiting", labels=labels)
        for worker in self._workers():
            values = [worker.worker_id, worker.role, worker.model, worker.pool]
            usage.add_metric(values, worker.load.kv_blocks_used / max(worker.kv_blocks_total, 1))
            running.add_metric(values, worker.load.running_sequences)
            waiting.add_metric(values, worker.load.waiting_sequences)
        yield from (usage, running, waiting)
