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
        chunks = -(-new // chunk_tokens)
        return self.chunk_s * chunks + self.token_s * new + self.token_context_s * new * (cached + new / 2)


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
class StepWork:
    """What one engine step computes: one more token for each of some sequences, chunks of some prompts, or both."""

    sequences: int = 0
    """That decode."""
    kv_tokens: int = 0
    """That these attend to, all together."""
    new_tokens: int = 0
    """Of prompts."""
    token_context: float = 0.0
    """The sum of `new * context` over the chunks, as PrefillCost has it."""
    steps: int = 1
    """More where some were not timed apart: chunks of prompts, and the last of the steps with anything else."""

    def __add__(self, other: "StepWork") -> "StepWork":
        return StepWork(
            self.sequences + other.sequences,
            self.kv_tokens + other.kv_tokens,
            self.new_tokens + other.new_tokens,
            self.token_context + other.token_context,
            self.steps + other.steps,
        )


@dataclass(frozen=True, slots=True)
class WorkerLatency:
    """What one worker publishes about itself."""

    prefill: PrefillCost
    decode: DecodeCost
    transfer: TransferCost
    """KV blocks between this worker and another, by the links it has used."""
    restore: Mapping[Tier, TransferCost] = field(default_factory=dict)
    """From a lower tier into HBM; only the tiers that the worker has."""

    def step_time_s(self, work: StepWork) -> float:
        """A step of both kinds costs what its chunks cost, and what its sequences add to a decode step: the weights
        are read once."""
        if not work.new_tokens:
            return self.decode.step_time_s(work.sequences, work.kv_tokens)
        chunks_s = self.prefill.chunk_s * work.steps + self.prefill.token_s * work.new_tokens
        return chunks_s + self.prefill.token_context_s * work.token_context + self.added_decode_s(work)

    def added_decode_s(self, work: StepWork) -> float:
        """What a step's decoding sequences add to it."""
        return self.decode.sequence_s * work.sequences + self.decode.kv_token_s * work.kv_tokens


DEFAULT_LATENCY = WorkerLatency(
    PrefillCost(chunk_s=0.005, token_s=0.0001, token_context_s=1e-9),
    DecodeCost(step_s=0.005, sequence_s=0.0002, kv_token_s=1e-7),
    TransferCost(latency_s=0.001, bytes_per_s=1e9),
)
"""For a worker that has measured nothing yet: a small model on a CPU, in order of magnitude."""
