"""What a replay comes to: the figures of one policy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.latency import TIERS, Tier
from simulator.decode import SimulatedDecodeWorker
from simulator.job import Job
from simulator.jump import StepLog
from simulator.prefill import SimulatedPrefillWorker
from simulator.tiers.worker_tiers import TierUse, WorkerTiers

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a latency, in seconds; 0 where there is none."""

    mean: float
    p50: float
    p99: float

    def shown(self, scale: float = 1.0, between: str = "/") -> str:
        """The three, with three digits each."""
        return between.join(three_digits(scale * value) for value in (self.mean, self.p50, self.p99))


def three_digits(value: float) -> str:
    """0.123, 1.23, 12.3, 123, 1234."""
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


@dataclass(frozen=True, slots=True)
class Report:
    policy: str
    requests: int
    """Of the trace, the refused ones included."""
    refused: int
    hit_rate: float
    """The share of the prompts' blocks that were found cached where the prompt was computed."""
    hit_rate_by_tier: dict[Tier, float]
    tiers: dict[Tier, TierUse]
    """Those below HBM: what all workers moved, and what any one held at most. Empty: there are none."""
    ttft_s: Spread
    """Arrival to first token at the decode worker."""
    itl_s: Spread
    """The gaps between a sequence's tokens, over all tokens."""
    e2e_s: Spread
    """Arrival to last token."""
    ttft_error: float
    """Median of |predicted - simulated| / simulated."""
    prefill_utilisation: float
    """The share of the time that the workers of a role were computing."""
    decode_utilisation: float
    preemptions: int
    local_prefills: int
    """Prompts that the decode worker computed itself."""
    duration_s: float
    """First arrival to last token."""
    output_tokens_per_s: float
    requests_per_s: float
    placed: dict[str, int]
    """How many requests each worker took part in."""
    ttfts_s: tuple[float, ...] = ()
    """Sorted; for charts."""

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["ttfts_s"]
        return fields

    def placed_on(self, worker_id: str) -> float:
        """The share of the requests served."""
        return self.placed.get(worker_id, 0) / max(self.requests - self.refused, 1)


def spread(values: Floats, weights: Floats | None = None) -> Spread:
    """Weighted: as if each value stood there so many times."""
    if not len(values):
        return Spread(0.0, 0.0, 0.0)
    order = np.argsort(values)
    values = values[order]
    counts = np.ones(len(values)) if weights is None else weights[order]
    reached = np.cumsum(counts)
    p50, p99 = (float(values[np.searchsorted(reached, share * reached[-1])]) for share in (0.50, 0.99))
    return Spread(float(values @ counts / reached[-1]), p50, p99)


def token_gaps(logs: Sequence[StepLog]) -> tuple[Floats, Floats]:
    """Every step's time, and how many sequences it was a gap for."""
    parts = [gaps_of(log) for log in logs]
    return np.concatenate([gaps for gaps, _ in parts]), np.concatenate([rows for _, rows in parts])


def gaps_of(log: StepLog) -> tuple[Floats, Floats]:
    steps = np.array(log.steps, dtype=np.int64)
    first_s, growth_s = np.repeat(np.array(log.first_s), steps), np.repeat(np.array(log.growth_s), steps)
    within = np.arange(len(first_s)) - np.repeat(np.cumsum(steps) - steps, steps)
    return first_s + growth_s * within, np.repeat(np.array(log.rows, dtype=np.float64), steps)


def hit_rates(jobs: Sequence[Job]) -> dict[Tier, float]:
    blocks = sum(len(job.request.block_ids) for job in jobs)
    return {tier: sum(job.cached_blocks(tier) for job in jobs) / max(blocks, 1) for tier in TIERS}


def tier_uses(workers: Sequence[WorkerTiers]) -> dict[Tier, TierUse]:
    uses = [tiers.uses() for tiers in workers]
    return {tier: reduce(TierUse.beside, (each[tier] for each in uses)) for tier in (uses[0] if uses else ())}


def ttft_error(jobs: Sequence[Job]) -> float:
    if not jobs:
        return 0.0
    predicted, real = (np.array([getattr(job, name) for job in jobs]) for name in ("predicted_ttft_s", "ttft_s"))
    return float(np.median(np.abs(predicted - real) / real))


def report(
    policy: str,
    jobs: Sequence[Job],
    prefill: Sequence[SimulatedPrefillWorker],
    decode: Sequence[SimulatedDecodeWorker],
) -> Report:
    """Once all jobs have been served or refused."""
    served = [job for job in jobs if job.refused is None]
    workers = [*(one.worker for one in prefill), *(one.worker for one in decode)]
    start_s = min(job.request.arrival_s for job in jobs)
    duration_s = max((job.end_s for job in served), default=start_s) - start_s
    ttfts_s = np.sort([job.ttft_s for job in served])
    rates = hit_rates(served)
    return Report(
        policy=policy,
        requests=len(jobs),
        refused=len(jobs) - len(served),
        hit_rate=sum(rates.values()),
        hit_rate_by_tier=rates,
        tiers=tier_uses([worker.tiers for worker in workers if worker.tiers]),
        ttft_s=spread(ttfts_s),
        itl_s=spread(*token_gaps([one.worker.engine.log for one in decode])),
        e2e_s=spread(np.array([job.e2e_s for job in served])),
        ttft_error=ttft_error(served),
        prefill_utilisation=utilisation([one.worker.engine.log for one in prefill], duration_s),
        decode_utilisation=utilisation([one.worker.engine.log for one in decode], duration_s),
        preemptions=sum(one.worker.scheduler.preemptions for one in decode),
        local_prefills=sum(not job.prefill_worker for job in served),
        duration_s=duration_s,
        output_tokens_per_s=sum(job.request.output_tokens for job in served) / max(duration_s, 1e-9),
        requests_per_s=len(served) / max(duration_s, 1e-9),
        placed=dict(sorted(Counter(worker for job in served for worker in job.workers).items())),
        ttfts_s=tuple(ttfts_s.tolist()),
    )


def utilisation(logs: Sequence[StepLog], duration_s: float) -> float:
    return sum(log.busy_s for log in logs) / max(len(logs) * duration_s, 1e-9)
