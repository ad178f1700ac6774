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


class RouterMetrics:
    """Every label value comes from a closed set or the settings, never from a request."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        self._requests = Counter(
            "baton_requests", "Requests answered", ["model", "protocol", "endpoint", "code"], registry=registry
        )

        def histogram(name: str, what: str, buckets: Iterable[float]) -> Histogram:
            family = Histogram(name, what, ["model"], buckets=tuple(buckets), registry=registry)
            return family.labels(model)

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, ["model"], registry=registry).labels(model)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, ["model"], registry=registry).labels(model)

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
        self.retries = counter("baton_placement_retries", "Sequences placed again because a worker failed them")
        self.running = gauge("baton_requests_running", "Sequences between their first token and their last")
        self.waiting = gauge("baton_requests_waiting", "Sequences placed and without a token yet")

    def answered(self, protocol: str, endpoint: str, code: str) -> None:
        self._requests.labels(self._model, protocol, endpoint, code).inc()


class WorkerCollector(Collector):
    """The members' load as of their last heartbeat; a worker that left leaves no series behind."""

    def __init__(self, workers: Callable[[], Iterable[WorkerInfo]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        labels = ["worker", "role", "model"]
        usage = GaugeMetricFamily("baton_worker_kv_cache_usage_ratio", "KV blocks held, of all", labels=labels)
        running = GaugeMetricFamily("baton_worker_running_sequences", "Sequences running", labels=labels)
        waiting = GaugeMetricFamily("baton_worker_waiting_sequences", "Sequences waiting", labels=labels)
        for worker in self._workers():
            values = [worker.worker_id, worker.role, worker.model]
            usage.add_metric(values, worker.load.kv_blocks_used / max(worker.kv_blocks_total, 1))
            running.add_metric(values, worker.load.running_sequences)
            waiting.add_metric(values, worker.load.waiting_sequences)
        yield from (usage, running, waiting)
