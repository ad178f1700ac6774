"""What a placement decision says: who was chosen, at what price, who else there was. In seconds throughout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.cluster.worker_info import WorkerInfo
from baton.ids import WorkerId


@dataclass(frozen=True, slots=True)
class Terms:
    """One placement's cost. The first five are the request's own wait for its first token, the sixth is its wait
    for all the others; the last three are what it makes others wait."""

    queue_s: float = 0.0
    restore_s: float = 0.0
    """From the tier that cached blocks lie in, and from another worker."""
    prefill_s: float = 0.0
    """Of what is cached nowhere on the worker that computes the prompt."""
    transfer_s: float = 0.0
    """The part that the prefill does not hide."""
    admission_s: float = 0.0
    """Until the decode worker has room, and its running step is over."""
    decode_s: float = 0.0
    """The steps that generate the tokens expected of it."""
    others_decode_s: float = 0.0
    """A longer decode step for each sequence running there, times the tokens it has left."""
    others_queue_s: float = 0.0
    """The longer wait of those still to come behind it."""
    others_evicted_s: float = 0.0
    """Computing again what its blocks push out of the cache."""

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.restore_s + self.prefill_s + self.transfer_s + self.admission_s

    @property
    def total_s(self) -> float:
        own_s = self.ttft_s + self.decode_s
        return own_s + self.others_decode_s + self.others_queue_s + self.others_evicted_s


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """The prompt's cached prefix on one worker, by the tier its blocks lie in."""

    hbm: int = 0
    ddr: int = 0
    ssd: int = 0
    peer: int = 0
    """On another worker, which it is fetched from."""

    @property
    def total(self) -> int:
        return self.hbm + self.ddr + self.ssd + self.peer


class Fetch(NamedTuple):
    """A prefix that the worker that computes the prompt gets from another first."""

    worker: WorkerInfo
    """Who has it."""
    tokens: int
    """How long a prefix that one hands out: whole blocks, from the prompt's first on."""
    fetched_tokens: int
    """The last ones of these: what the other lacks."""
    fetch_s: float
    compute_s: float
    """What computing the same tokens would take."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Who computes the prompt if others cannot, and what it fetches first."""

    worker: WorkerInfo
    fetch: Fetch | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair of workers and what it would cost."""

    decode: WorkerInfo
    prefill: WorkerInfo | None
    """None: prefill on the decode worker."""
    terms: Terms
    itl_s: float
    """One decode step with the request in it."""
    cached_tokens: CachedTokens
    """On the worker that computes the prompt."""
    decode_cached_tokens: CachedTokens
    fetch: Fetch | None = None

    @property
    def work_s(self) -> float:
        """Of the worker that computes the prompt: it does other things while it fetches."""
        return self.terms.restore_s + self.terms.prefill_s - (self.fetch.fetch_s if self.fetch else 0.0)


@dataclass(frozen=True, slots=True)
class Excluded:
    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    policy: str
    chosen: Candidate
    prefill_fallbacks: tuple[Fallback, ...]
    """Who computes the prompt if the chosen prefill worker fails; best first."""
    others: Sequence[Candidate]
    """The best of those not chosen, best first; a bounded number. Built where somebody looks: most never are."""
    considered: int
    """Pairs, the chosen one included."""
    excluded: tuple[Excluded, ...]
    prompt_tokens: int
    expected_tokens: float
    """Tokens that it is expected to generate."""

    @property
    def margin_s(self) -> float:
        """The best other candidate's cost less the chosen one's; 0 where there is no other."""
        return self.others[0].terms.total_s - self.chosen.terms.total_s if self.others else 0.0
