"""The latency model: how long prefill, decode steps and moving KV take. One model for router, planner,
offloader and simulator; workers fit its coefficients to what they measure and publish them.

All times in seconds. A prefill chunk takes `a + b·new + c·new·context`, a decode step
`a + b·sequences + c·kv_tokens`, moving bytes `latency + bytes / bandwidth`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["hbm", "ddr", "ssd"]
TIERS: tuple[Tier, ...] = ("hbm", "ddr", "ssd")


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """`context` of a chunk is how many tokens one of its tokens attends to on average: those before the chunk and
    half of the chunk itself."""

    chunk_s: float
    token_s: float
    token_context_s: float

    def chunk_time_s(self, new: int, context: float) -> float:
        return self.chunk_s + self.token_s * new + self.token_context_s * new * context

    def prompt_time_s(self, new: int, cached: int, chunk_tokens: int) -> float:
        """`new` tokens after `cached` ones, in chunks. The sum over the chunks, in closed form: whatever their
        size, their tokens attend to `cached + new / 2` tokens on average."""
        return self.chunk_time_s(new, cached + new / 2) + self.chunk_s * (-(-new // chunk_tokens) - 1)


@dataclass(frozen=True, slots=True)
class DecodeCost:
    step_s: float
    sequence_s: float
    kv_token_s: float

    def step_time_s(self, sequences: float, kv_tokens: float) -> float:
        return self.step_s + self.sequence_s * sequences + self.kv_token_s * kv_tokens


@dataclass(frozen=True, slots=True)
class TransferCost:
    latency_s: float
    bytes_per_s: float

    def time_s(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class WorkerLatency:
    """What one worker publishes about itself."""

    prefill: PrefillCost
    decode: DecodeCost
    transfer: TransferCost
    """KV blocks between this worker and another, by the links it has used."""
    restore: Mapping[Tier, TransferCost] = field(default_factory=dict)
    """From a lower tier into HBM; only the tiers that the worker has."""


DEFAULT_LATENCY = WorkerLatency(
    PrefillCost(chunk_s=0.005, token_s=0.0001, token_context_s=1e-9),
    DecodeCost(step_s=0.005, sequence_s=0.0002, kv_token_s=1e-7),
    TransferCost(latency_s=0.001, bytes_per_s=1e9),
)
"""For a worker that has measured nothing yet: a small model on a CPU, in order of magnitude."""
