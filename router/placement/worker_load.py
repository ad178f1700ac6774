"""What a router knows of one worker's load: what it placed there, what its peers did, what the worker reported."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from baton.cluster.router_info import PlacedLoad
from baton.cluster.worker_info import WorkerInfo

NO_LOAD = PlacedLoad()
REPORT_PERIOD_S = 1.0
"""A worker's heartbeat; see baton.cluster.lease."""
REPORT_AGE_MAX_S = 0.25
"""How old its record may be when it comes: the period of the watch."""


@dataclass(slots=True)
class PlacedSequence:
    """One sequence on the workers it was placed on, until it is finished."""

    compute: "WorkerLoad"
    """Where its prompt is computed; the decode worker itself, perhaps."""
    decode: "WorkerLoad"
    prefill_tokens: int
    prefill_s: float
    itl_s: float
    kv_tokens: int
    kv_blocks: int
    """That it takes of the decode worker's pool, shared ones apart."""
    expected_tokens: float
    stay_s: float
    """From its admission on the decode worker to its end, as predicted."""
    due_s: float
    """When its prompt is expected to come to where it is computed."""
    generated_tokens: int = 0
    has_token: bool = False


class _Placed(NamedTuple):
    """What this router had placed on a worker when that last reported."""

    sequences: int
    kv_tokens: int
    kv_blocks: int
    peers_kv_tokens: int


class WorkerLoad:
    """Sums over what this router placed on one worker, beside what it was told by others.

    Prompts wait there as the worker last reported, and after those the ones placed since. They are computed first
    come, first served: so the oldest is the one being computed, since the last one was done or, where none was
    before it, since it came. A prompt whose decode worker has no room is not there yet.
    """

    __slots__ = (
        "_reported",
        "column",
        "info",
        "kv_blocks",
        "kv_tokens",
        "peers",
        "peers_at_s",
        "prefill_since_s",
        "prefill_tokens",
        "remaining_tokens",
        "reported_at_s",
        "sequences",
        "slot",
        "stay_s",
        "unreported",
        "unreported_s",
        "unreported_tokens",
        "waiting_prompts",
    )

    def __init__(self, info: WorkerInfo, now_s: float) -> None:
        self.info, self.reported_at_s = info, now_s
        self.column = 0
        """Its place in its fleet's arrays."""
        self.slot: int | None = None
        """Its place in the prefix index."""
        self.peers, self.peers_at_s = NO_LOAD, now_s
        self.waiting_prompts, self.prefill_tokens = 0, 0
        """Of all prompts placed there that have no first token yet."""
        self.unreported: dict[Hashable, PlacedSequence] = {}
        """Those of them that the worker's reports do not show yet, oldest first."""
        self.unreported_s, self.unreported_tokens, self.prefill_since_s = 0.0, 0, now_s
        self.sequences, self.kv_tokens, self.kv_blocks, self.remaining_tokens, self.stay_s = 0, 0, 0, 0.0, 0.0
        self._reported = _Placed(0, 0, 0, 0)

    # ---- what this router places

    def add_prefill(self, sequence_id: Hashable, sequence: PlacedSequence, now_s: float) -> None:
        self.waiting_prompts += 1
        self.prefill_tokens += sequence.prefill_tokens
        if sequence.due_s > now_s + REPORT_PERIOD_S:
            return  # until then a report will show it
        if not self.unreported:
            self.prefill_since_s = now_s
        self.unreported[sequence_id] = sequence
        self.unreported_s += sequence.prefill_s
        self.unreported_tokens += sequence.prefill_tokens

    def end_prefill(self, sequence_id: Hashable, sequence: PlacedSequence, now_s: float) -> None:
        self.waiting_prompts -= 1
        self.prefill_tokens -= sequence.prefill_tokens
        self.prefill_since_s = now_s
        self._show(sequence_id)

    def report(self, info: WorkerInfo, now_s: float) -> None:
        """The worker's new record: it shows the prompts that were due when it was written."""
        self.info, self.reported_at_s = info, now_s
        self._reported = _Placed(self.sequences, self.kv_tokens, self.kv_blocks, self.peers.kv_tokens)
        shown = [id_ for id_, sequence in self.unreported.items() if sequence.due_s <= now_s - REPORT_AGE_MAX_S]
        for sequence_id in shown:
            self._show(sequence_id)

    def _show(self, sequence_id: Hashable) -> None:
        if (sequence := self.unreported.pop(sequence_id, None)) is not None:
            self.unreported_tokens -= sequence.prefill_tokens
            left_s = self.unreported_s - sequence.prefill_s
            self.unreported_s = left_s if self.unreported else 0.0  # sums of floats drift

    def add_sequence(self, sequence: PlacedSequence) -> None:
        self.sequences += 1
        self.kv_tokens += sequence.kv_tokens
        self.kv_blocks += sequence.kv_blocks
        self.remaining_tokens += sequence.expected_tokens
        self.stay_s += sequence.stay_s

    def end_sequence(self, sequence: PlacedSequence) -> None:
        self.sequences -= 1
        self.kv_tokens -= sequence.kv_tokens
        self.kv_blocks -= sequence.kv_blocks
        left = sequence.expected_tokens - sequence.generated_tokens
        self.remaining_tokens = self.remaining_tokens - left if self.sequences else 0.0
        self.stay_s = self.stay_s - sequence.stay_s if self.sequences else 0.0

    def progress(self, sequence: PlacedSequence, tokens: int) -> None:
        """A sequence that outlives what was expected of it is expected to generate as much again."""
        sequence.generated_tokens += tokens
        sequence.kv_tokens += tokens
        self.kv_tokens += tokens
        self.remaining_tokens -= tokens
        while sequence.generated_tokens >= sequence.expected_tokens:
            self.remaining_tokens += sequence.expected_tokens
            sequence.expected_tokens *= 2

    # ---- what follows from it

    @property
    def oldest_unreported_s(self) -> float:
        return next(iter(self.unreported.values())).prefill_s if self.unreported else 0.0

    @property
    def running(self) -> int:
        """Sequences that decode there or will: what the worker reported and what has changed since, or what routers
        know of, whichever is more. Both count the same sequences, so their sum would count them twice."""
        load = self.info.load
        reported = load.running_sequences + load.waiting_sequences + self.sequences - self._reported.sequences
        return max(reported, self.sequences + self.peers.sequences)

    @property
    def running_kv_tokens(self) -> int:
        reported = self.info.load.kv_tokens + self.kv_tokens - self._reported.kv_tokens
        return max(reported, self.kv_tokens + self.peers.kv_tokens)

    @property
    def used_blocks(self) -> int:
        load, before = self.info.load, self._reported
        since = self.kv_blocks - before.kv_blocks
        peers_since = (self.peers.kv_tokens - before.peers_kv_tokens) // self.info.block_tokens
        return max(load.kv_blocks_used + load.kv_blocks_wanted + since + peers_since, 0)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to compute there."""
        return max(self.info.load.waiting_tokens, self.prefill_tokens) + self.peers.prefill_tokens

    def remaining_tokens_each(self, unknown: float) -> float:
        """Of the sequences there, on average; at least one, and `unknown` where no router placed any."""
        known = self.sequences + self.peers.sequences
        return max((self.remaining_tokens + self.peers.remaining_tokens) / known if known else unknown, 1.0)

    @property
    def is_idle(self) -> bool:
        """As far as this router knows of its own."""
        return not self.sequences and not self.waiting_prompts

    def placed(self) -> PlacedLoad:
        return PlacedLoad(
            prefill_tokens=self.unreported_tokens,
            sequences=self.sequences,
            kv_tokens=self.kv_tokens,
            remaining_tokens=round(self.remaining_tokens),
        )
