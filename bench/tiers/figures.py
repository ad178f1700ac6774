"""What was measured, by where a prompt's KV came from. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

Source = Literal["cold", "hbm", "ddr", "ssd", "peer"]
Work = Literal["prefill", "decode"]
TiersDo = Literal["idle", "offload"]
"""idle: the pool has room for everything. offload: each prompt evicts as much as it takes, which goes down to DDR, and
from there on to the SSD."""
BLOCK_TOKENS = 32
SOURCES: tuple[Source, ...] = ("cold", "hbm", "ddr", "ssd", "peer")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request."""

    source: Source
    tokens: int
    turn: int
    token_id: int
    ttft_s: float
    cold_s: float
    """The same prompt's time to first token without any cache, on the same worker in the same turn."""
    reused_tokens: int
    moved_s: float = 0.0
    """How long the request waited for what was restored or fetched."""

    @property
    def is_whole(self) -> bool:
        """All of the prompt that can be was found, restored or fetched: whole blocks, and not its last token."""
        return self.reused_tokens >= (self.tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


VERIFIED_BY_DEFAULT = "sampled"
"""What `verify_ddr` is unless workers are told otherwise."""


@dataclass(frozen=True, slots=True)
class Rate:
    source: Source
    gb_per_s: float
    verified: str = VERIFIED_BY_DEFAULT
    """Which of DDR's blocks: always, sampled or never."""

    @property
    def is_default(self) -> bool:
        return self.verified == VERIFIED_BY_DEFAULT


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of an engine's steps with tiers below its pool."""

    work: Work
    tiers: TiersDo
    step_ms: float
    """The median."""
    plain_step_ms: float
    """Of an engine without tiers."""
    of_plain: float
    """The median, over pairs of engines, of the median of each step's time over that of the same step without tiers."""
    of_plain_least: float
    """Of the pairs."""
    of_plain_most: float
    cpu_of_plain: float
    """The same of the CPU time of the engine's thread, which a busy machine hardly changes."""


@dataclass(frozen=True, slots=True)
class Measured:
    samples: Sequence[Sample]
    rates: Sequence[Rate]
    memcpy_gb_per_s: float
    disk_read_gb_per_s: float
    is_direct: bool
    """Whether the disk is read past the page cache."""
    steps: Sequence[StepCost] = ()

    @property
    def wrong_tokens(self) -> int:
        """Requests whose first token is not that of the cold one."""
        cold = {(sample.tokens, sample.turn): sample.token_id for sample in self.samples if sample.source == "cold"}
        return sum(sample.token_id != cold[sample.tokens, sample.turn] for sample in self.samples)

    def ttft_s(self, source: Source, tokens: int) -> float | None:
        """The median; None: not measured."""
        return _median(sample.ttft_s for sample in self._of(source, tokens))

    def of_cold(self, source: Source, tokens: int) -> float | None:
        """The median of each turn's ratio."""
        return _median(sample.ttft_s / sample.cold_s for sample in self._of(source, tokens))

    def moved_s(self, source: Source, tokens: int) -> float | None:
        return _median(sample.moved_s for sample in self._of(source, tokens))

    def reused_tokens(self, source: Source, tokens: int) -> float | None:
        return _median(sample.reused_tokens for sample in self._of(source, tokens))

    @property
    def lengths(self) -> list[int]:
        return sorted({sample.tokens for sample in self.samples})

    def _of(self, source: Source, tokens: int) -> list[Sample]:
        return [sample for sample in self.samples if (sample.source, sample.tokens) == (source, tokens)]

    def as_json(self) -> dict[str, Any]:
        cells = [(tokens, source) for tokens in self.lengths for source in SOURCES if self._of(source, tokens)]
        return {
            "memcpy_gb_per_s": self.memcpy_gb_per_s,
            "disk_read_gb_per_s": self.disk_read_gb_per_s,
            "disk_is_read_directly": self.is_direct,
            "ttft": [
                {
                    "tokens": tokens,
                    "source": source,
                    "ttft_s": self.ttft_s(source, tokens),
                    "of_cold": self.of_cold(source, tokens),
                    "waited_s": self.moved_s(source, tokens),
                    "reused_tokens": self.reused_tokens(source, tokens),
                }
                for tokens, source in cells
            ],
            "restore": [{"source": rate.source, "gb_per_s": rate.gb_per_s} for rate in self.rates if rate.is_default],
            "restore_ddr_verified": {rate.verified: rate.gb_per_s for rate in self.rates if rate.source == "ddr"},
            "steps": [asdict(cost) for cost in self.steps],
            "wrong_first_tokens": self.wrong_tokens,
        }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None
