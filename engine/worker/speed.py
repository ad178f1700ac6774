"""How fast a worker is, as it learns that: from its self-tests first, then from everything it does."""

import logging
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from baton.latency_fit import LatencyFit
from engine.core import LocalEngine
from engine.interface import StepTiming
from engine.runner import StepLogits
from engine.thread import EngineThread
from engine.worker.latency_metrics import LatencyMetrics
from kvcache.tiers.interface import RestoreTiming

log = logging.getLogger(__name__)


class MeasuredSpeed:
    """One worker's, on its loop; `latency` may be read from any thread."""

    def __init__(self, registry: CollectorRegistry, role: str, model: str, chunk_tokens: int) -> None:
        self._fit, self._chunk_tokens = LatencyFit(), chunk_tokens
        self._metrics = LatencyMetrics(registry, role, model, lambda: self.latency)
        self._learned()

    def _learned(self) -> None:
        self.latency = self._fit.latency

    def compute_s(self, new: int, cached: int) -> float:
        """How long a prompt's `new` tokens behind `cached` ones take, once it is their turn."""
        return self.latency.prefill.prompt_time_s(new, cached, self._chunk_tokens)

    # ---- before it serves

    async def self_test(self, engine: EngineThread[LocalEngine[StepLogits]]) -> None:
        """A worker that fails it may serve all the same; its speed is then learned from what it serves."""
        try:
            self._tested_steps(await engine.call(lambda engine: engine.self_test()))
        except Exception:
            log.warning("The self-test failed; this worker's speed is not known yet", exc_info=True)
        try:
            self._tested_tiers(await engine.call(lambda engine: engine.tiers.self_test() if engine.tiers else ()))
        except Exception:
            log.warning("The tiers' self-test failed; their speed is not known yet", exc_info=True)

    def _tested_steps(self, timings: Sequence[StepTiming]) -> None:
        self._fit = LatencyFit.of([(timing.work, timing.duration_s) for timing in timings])
        self._learned()
        chunk = self._chunk_tokens
        log.info(
            "measured by %d steps: %.1f ms for a chunk of %d tokens, %.1f ms for a decode step of one sequence",
            *(len(timings), 1000 * self.latency.prefill.chunk_time_s(chunk, chunk / 2), chunk),
            1000 * self.latency.decode.step_time_s(1, chunk),
        )

    def _tested_tiers(self, timings: Sequence[RestoreTiming]) -> None:
        for timing in timings:
            self._fit.observe_restore_test(timing.tier, timing.size_bytes, timing.seconds)
        self._learned()
        for tier, cost in self.latency.restore.items():
            log.info("measured %s: %.2f ms and %.2f GB/s", tier, 1000 * cost.latency_s, cost.bytes_per_s / 1e9)

    def tested_link(self, size_bytes: int, seconds: float) -> None:
        self._fit.observe_link_test(size_bytes, seconds)
        self._learned()

    # ---- while it serves: each is compared with its prediction and learned from

    def stepped(self, timing: StepTiming) -> None:
        self._metrics.measured_step(timing)
        self._fit.observe_step(timing.work, timing.duration_s)
        self._learned()

    def transferred(self, size_bytes: int, seconds: float) -> None:
        self._metrics.measured_transfer(size_bytes, seconds)
        self._fit.observe_transfer(size_bytes, seconds)
        self._learned()

    def restored(self, timing: RestoreTiming) -> None:
        self._metrics.measured_restore(timing)
        self._fit.observe_restore(timing.tier, timing.size_bytes, timing.seconds)
        self._learned()
