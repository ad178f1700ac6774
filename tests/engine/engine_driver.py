"""Drives a LocalEngine by hand, step by step, and remembers what it told."""

from collections.abc import Sequence
from typing import Any

from baton.ids import RequestId
from baton.sampling import SamplingParams
from engine.core import LocalEngine
from engine.interface import Admitted, EngineRequest, FinishReason, Generated, Prefill, StepResult


class EngineDriver:
    """Greedy requests of four tokens, unless asked otherwise. Checks the engine's integrity after each step."""

    def __init__(self, engine: LocalEngine[Any]) -> None:
        self.engine = engine
        self.outputs: dict[RequestId, list[int]] = {}
        self.admitted: dict[RequestId, Admitted] = {}
        self.ended: dict[RequestId, Generated] = {}
        self.first: dict[RequestId, Generated] = {}
        self.failed: dict[RequestId, Exception] = {}

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        prefill: Prefill = Prefill.HERE,
        salt: str = "",
        generated: Sequence[int] = (),
        **sampling: object,
    ) -> RequestId:
        request_id = RequestId(name)
        params = SamplingParams(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        self.engine.add(EngineRequest(request_id, tuple(prompt), params, prefill, salt, tuple(generated)))
        return request_id

    def step(self) -> StepResult:
        result = self.engine.step()
        for admitted in result.admitted:
            assert admitted.request_id not in self.admitted
            self.admitted[admitted.request_id] = admitted
        for generated in result.generated:
            self._note(generated)
        for failed in result.failed:
            self.failed[failed.request_id] = failed.error
        self.engine.check_integrity()
        return result

    def _note(self, generated: Generated) -> None:
        request_id = generated.request_id
        assert request_id not in self.ended
        self.first.setdefault(request_id, generated)
        self.outputs.setdefault(request_id, []).extend(generated.token_ids)
        if generated.finish_reason:
            self.ended[request_id] = generated

    def run(self, steps_max: int = 1000) -> None:
        """Steps as long as there is work."""
        for _ in range(steps_max):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {steps_max} steps")

    def reason(self, request_id: RequestId) -> FinishReason | None:
        return self.ended[request_id].finish_reason

    def assert_idle(self) -> None:
        """Nobody holds a block, and every block is free or cached."""
        stats = self.engine.stats()
        self.engine.check_integrity()
        assert (stats.kv_blocks_used, stats.running_sequences, stats.waiting_sequences, stats.waiting_tokens) == (
            0,
        ) * 4
        assert stats.kv_blocks_free == stats.kv_blocks_total - stats.kv_blocks_cached
        assert not self.engine.has_work
