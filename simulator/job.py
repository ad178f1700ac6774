"""One request of the trace on its way through the simulated cluster, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.ids import BlockHash
from baton.latency import Tier
from simulator.sequence import SimulatedSequence
from simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest


@dataclass(slots=True, eq=False)
class Job:
    number: int
    request: TraceRequest
    names: Sequence[BlockHash]
    """Of the prompt's whole blocks."""
    refused: str | None = None
    """Why; None: it was served."""
    decode_worker: str = ""
    prefill_worker: str = ""
    """Empty: prefilled on the decode worker."""
    cached_tokens: int = 0
    """Found where the prompt was computed, so that they were not computed again."""
    restored: Mapping[Tier, int] = field(default_factory=dict)
    """Blocks of these that came up from lower tiers."""
    first_token_s: float | None = None
    finished_s: float | None = None
    predicted_ttft_s: float = 0.0
    untold_tokens: int = 0
    """Generated, but not told to the placer yet."""

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.request.arrival_s

    @property
    def end_s(self) -> float:
        assert self.finished_s is not None
        return self.finished_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.request.arrival_s

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.prefill_worker, self.decode_worker)))

    def computed_with(self, sequence: SimulatedSequence) -> None:
        """Where its prompt was computed."""
        self.cached_tokens, self.restored = sequence.cached_tokens, sequence.restored

    def cached_blocks(self, tier: Tier) -> int:
        if tier == "hbm":
            return self.cached_tokens // TRACE_BLOCK_TOKENS - sum(self.restored.values())
        return self.restored.get(tier, 0)
