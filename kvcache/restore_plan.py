"""How much of a prompt to bring up from lower tiers, and how much to compute: whatever takes the least time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from baton.latency import Tier, TransferCost, WorkerLatency

DEFAULT_RESTORE: Mapping[Tier, TransferCost] = {
    "ddr": TransferCost(latency_s=0.0005, bytes_per_s=4e9),
    "ssd": TransferCost(latency_s=0.001, bytes_per_s=1e9),
}
"""For a worker that has measured none of its own yet: an ordinary machine, in order of magnitude."""

Run = tuple[Tier, int]
"""So many blocks, one after the other, that lie in one tier."""


@dataclass(frozen=True, slots=True)
class RestoreCosts:
    """What a plan depends on beside the prompt."""

    latency: WorkerLatency
    block_tokens: int
    block_bytes: int
    chunk_tokens: int

    def compute_s(self, tokens: int, cached: int) -> float:
        """All but the first `cached` of a prompt's tokens."""
        return self.latency.prefill.prompt_time_s(tokens - cached, cached, self.chunk_tokens)

    def block_s(self, depth: int) -> float:
        """Computing the block at this depth of a prompt, as one of many."""
        first, tokens, prefill = depth * self.block_tokens, self.block_tokens, self.latency.prefill
        chunk_s = prefill.chunk_s * tokens / self.chunk_tokens
        return chunk_s + tokens * (prefill.token_s + prefill.token_context_s * (first + tokens / 2))

    def restore_s(self, blocks: Mapping[Tier, int]) -> float:
        """So many blocks from each tier, one tier after the other."""
        restore = self.latency.restore
        return sum(restore[tier].time_s(count * self.block_bytes) for tier, count in blocks.items() if count)


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Reuse the first `blocks` of the prompt; those of them that lie below HBM are up after `restore_s`."""

    blocks: int
    restore_s: float


def plan_restore(runs: Iterable[Run], tokens: int, costs: RestoreCosts, queued_s: float = 0.0) -> RestorePlan:
    """Of a prompt of `tokens` tokens whose first blocks lie where `runs` says, none of them with its last token. What
    other prompts restore already takes until `queued_s` from now.

    The predicted time to have all tokens is the time that the restored blocks take and the time to compute the rest.
    Within a run it is a concave function of where to cut, so that it is least at one end of a run: only those are
    looked at. A tier whose speed is not known is not used.
    """
    best, best_s = RestorePlan(0, 0.0), costs.compute_s(tokens, 0)
    blocks, below = 0, Counter[Tier]()
    for tier, count in runs:
        if tier != "hbm":
            if tier not in costs.latency.restore:
                break
            below[tier] += count
        blocks += count
        restore_s = queued_s + costs.restore_s(below) if below else 0.0
        total_s = restore_s + costs.compute_s(tokens, blocks * costs.block_tokens)
        if total_s <= best_s:
            best, best_s = RestorePlan(blocks, restore_s), total_s
    return best


def runs_of(places: Sequence[Tier]) -> list[Run]:
    """Of blocks by the tier that each lies in."""
    return [(tier, len(list(same))) for tier, same in groupby(places)]


def keeps_ahead(landed: int, layers: int, left_s: float, step_s: float) -> bool:
    """Whether a step that begins now waits for no layer of a restore: `landed` of its `layers` layers are there, the
    others come within `left_s`, evenly, and the step computes all of its layers evenly in `step_s`.

    Layer i has to be there after i layers' compute. It comes after `i + 1 - landed` layers' restore, so it is enough
    to look at the next one and at the last one. Who waits until this holds is done no later than who begins at once
    and waits in between. As long as nothing has landed, `left_s` is a hope.
    """
    if landed >= layers:
        return True
    next_s, layer_s = left_s / (layers - landed), step_s / layers
    return landed > 0 and next_s <= landed * layer_s and left_s <= (layers - 1) * layer_s


def should_give_up(waited_s: float, left_s: float, expected_s: float, compute_s: float) -> bool:
    """Whether a restore that was begun `waited_s` ago, and expected to take `expected_s`, has turned too slow: what is
    left of it takes longer than computing all of it, or it is overdue by so much that nothing is to be expected."""
    if waited_s <= expected_s + GRACE_S:
        return False
    return left_s > compute_s or waited_s > overdue_s(expected_s, compute_s)


def overdue_s(expected_s: float, compute_s: float) -> float:
    """After so long a restore is given up, whatever it says of itself."""
    return OVERDUE_FACTOR * max(expected_s, compute_s) + 2 * GRACE_S


OVERDUE_FACTOR = 2.0
GRACE_S = 0.02
"""What threads that have to wait for a processor may cost."""
