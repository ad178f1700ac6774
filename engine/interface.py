"""What a worker asks of an engine: the small protocol behind which another engine could stand.

An engine is not thread-safe: one thread (engine/thread.py) owns it, and with it the model, the
scheduler and the block pool.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from baton.cluster.cache_events import CacheChanges
from baton.errors import BatonError
from baton.ids import BlockHash, BlockId, RequestId, TenantTag
from baton.latency import StepWork, Tier
from baton.layout import KVLayout
from baton.sampling import PositionLogprobs as PositionLogprobs
from baton.sampling import SamplingParams
from baton.sampling import TokenLogprob as TokenLogprob
from kvcache.tiers.interface import LowerTiers, RestoreTiming
from kvtransfer.interface import Region


class Prefill(Enum):
    """Where a request's prompt is computed, seen from this engine."""

    HERE = "here"
    """Prefill, then decode, on this engine."""
    ELSEWHERE = "elsewhere"
    """Reserve blocks and wait: another engine's KV is written into them until `commit`."""
    ONLY = "only"
    """Prefill, sample the first token, then hold the blocks until `release`."""


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a request's KV is promised to be kept below HBM, and for whom."""

    tenant: str = ""
    ttl_s: float = 0.0
    pin: bool = False
    quota_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    request_id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    prefill: Prefill
    cache_salt: str = ""
    generated: tuple[int, ...] = ()
    """What another engine generated after the prompt before it was lost. This one goes on as if it had generated
    that itself, and tells only what comes after: positions, penalties, min_tokens and max_tokens count it, and it
    belongs to what Prefill speaks of as the prompt."""
    retention: Retention = Retention()

    @property
    def known_tokens(self) -> int:
        """Of prompt and what was generated before: what is to be computed before the next token can be drawn."""
        return len(self.prompt) + len(self.generated)


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request left the queue and holds blocks for all its known tokens.

    `blocks` stay the request's own until it finishes, is aborted, or (Prefill.ONLY) released.
    The first `cached_tokens` tokens, always whole blocks, were found in the prefix cache. The last `restoring_tokens`
    of these are still on their way up from a lower tier. Prefill.ONLY: the layer listener is told of them, and
    StepResult.digested, as of blocks that are computed, before those that are.
    """

    request_id: RequestId
    blocks: tuple[BlockId, ...]
    cached_tokens: int
    digests: tuple[int, ...] = ()
    """Prefill.ONLY: of the cached blocks in HBM, where the engine makes digests."""
    restoring_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generated:
    """Tokens of one request in one step. With a finish reason the request is gone from the engine
    (except under Prefill.ONLY, where its blocks are held until `release`)."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    """With the first token, when asked for; the first position's is empty."""
    cached_tokens: int = 0
    preemptions: int = 0
    restored_tokens: int = 0
    """Of the cached ones: came up from a lower tier."""
    restore_s: float = 0.0
    """From admission until they were all there."""


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: RequestId
    error: BatonError


@dataclass(frozen=True, slots=True)
class BlocksDigested:
    """The digests (baton/digest.py) of a Prefill.ONLY request's blocks `[first, first + len(digests))`, computed
    where the blocks were made. Each block that was computed here is told once, in order, before the request's
    Generated or with it."""

    request_id: RequestId
    first: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """Cached blocks that are kept as they are until `let_go`."""

    blocks: tuple[BlockId, ...]
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks of the pool that are to be filled with a prefix by somebody else than a request of this engine."""

    held: tuple[BlockId, ...]
    """The part of the prefix that lies in HBM, kept until `adopt`."""
    names: tuple[BlockHash, ...]
    """What comes after it and is to be filled in; perhaps nothing."""
    blocks: tuple[BlockId, ...]
    """Where: as many."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """What was computed, and how long it took."""

    work: StepWork
    duration_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    admitted: tuple[Admitted, ...] = ()
    generated: tuple[Generated, ...] = ()
    failed: tuple[Failed, ...] = ()
    digested: tuple[BlocksDigested, ...] = ()
    restored: tuple[RestoreTiming, ...] = ()
    """Restores that have ended."""
    timing: StepTiming | None = None
    """Of a step that computed and was waited for; on a device that is not every one (engine/stopwatch.py)."""
    cache_changes: CacheChanges = CacheChanges()  # noqa: RUF009 - frozen, and nobody changes its mappings

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return bool(
            self.admitted
            or self.generated
            or self.failed
            or self.digested
            or self.restored
            or self.timing
            or self.cache_changes
        )


@dataclass(frozen=True, slots=True)
class BlocksWritten:
    """In one layer, a request's blocks `[first, end)` (indices into those it was admitted with) have their
    final content: every known token in them is computed."""

    request_id: RequestId
    first: int
    end: int


LayerListener = Callable[[int, Sequence[BlocksWritten]], None]
"""Called on the engine thread as `listener(layer, written)` as soon as a layer's keys and values of a
prefill chunk lie in the region, before the layers above are computed. It must not block."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of the house needs to know about a loaded model."""

    name: str
    fingerprint: str
    """Hex digest of architecture, weights and dtype: equal means interchangeable KV."""
    context_length: int
    """Prompt and completion together: the model's own limit, or the pool's when that is smaller."""
    vocabulary_size: int
    eos_token_ids: frozenset[int]
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class EngineStats:
    running_sequences: int = 0
    waiting_sequences: int = 0
    waiting_tokens: int = 0
    """Prompt tokens still to compute here, of waiting and running requests alike."""
    waiting_token_context: float = 0.0
    """The sum of `new * context` over these, as baton.latency.PrefillCost has it."""
    kv_tokens: int = 0
    """That the running sequences attend to: all they have computed."""
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    """Held by a request."""
    kv_blocks_wanted: int = 0
    """That the requests which wait for room will take."""
    kv_blocks_cached: int = 0
    """Held by nobody, with a content that a prefix can reuse; given away when space is needed."""
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    """Prompt tokens looked up in, and found in, the prefix cache since the start."""
    preemptions: int = 0
    steps: int = 0
    tier_hits_tokens: Mapping[Tier, int] = field(default_factory=dict)
    """Of the hits, by the tier that they were found in."""
    recomputed_tokens: int = 0
    """By preempted sequences, of what they had computed before."""

    @property
    def kv_blocks_free(self) -> int:
        return self.kv_blocks_total - self.kv_blocks_used - self.kv_blocks_cached


class Engine(Protocol):
    model: ModelInfo
    region: Region

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises InvalidRequest if it can never be served: an empty prompt, ids
        outside the vocabulary, longer than the context, `generated` complete already; Overloaded if the queue
        is full."""

    def abort(self, request_id: RequestId) -> None:
        """Forgets the request and frees its blocks; unknown ids are ignored."""

    def abandon(self, request_id: RequestId) -> None:
        """Prefill.ELSEWHERE, after Admitted: like `abort`, but somebody may still write into its blocks, so those that
        were not cached stay out of the pool until `reclaim`. A request of the same id may be added meanwhile."""

    def reclaim(self, request_id: RequestId) -> None:
        """Nobody writes any more into the blocks of the abandoned requests of this id: they are free. Unknown ids are
        ignored."""

    def hold(self, names: Sequence[BlockHash]) -> Held:
        """The longest run of `names`, from the first on, that the prefix cache has in HBM; may be empty. The caller
        lets each Held go once."""

    def let_go(self, held: Held) -> None: ...

    def promote(self, names: Sequence[BlockHash], on_done: Callable[[], None]) -> bool:
        """Begins to bring up, into free or cached blocks, what lies in lower tiers of the run that `hold` would find
        if all were in HBM; it becomes prefix cache. False: there is nothing to bring up, or no room for it. Else
        `on_done` is called on the engine's thread when it is over, whatever came of it."""

    def reserve(self, prompt: Sequence[int], cache_salt: str, blocks_max: int) -> Reserved:
        """Blocks for what this engine has in no tier of the prompt's first `blocks_max` blocks (and not its last
        token), to be fetched from a peer: at most RESERVED_DIVISOR's part of the pool, and only where that many are
        available. The caller adopts it once, in any case."""

    def adopt(self, reserved: Reserved, digests: Sequence[int], owner: Retention) -> None:
        """The first `len(digests)` of the reserved blocks hold what their names say and become prefix cache; the
        others are free again. Zero digests: not known."""

    @property
    def tiers(self) -> LowerTiers | None:
        """Those below its pool, where it has any; for the engine's thread alone."""

    def clear_cache(self, tenant: TenantTag | None) -> tuple[int, int]:
        """Forgets a tenant's cached blocks, or all, in every tier; what requests hold now goes when these end, and what
        is on its way up, or from a peer, does not become prefix cache. Blocks and bytes, a block that lies in several
        tiers counted in each."""

    def commit(
        self,
        request_id: RequestId,
        first_token: int,
        logprobs: tuple[PositionLogprobs, ...],
        digests: tuple[int, ...] = (),
    ) -> None:
        """Prefill.ELSEWHERE, after Admitted: the prompt's KV lies in the reserved blocks. They become
        visible to the prefix cache and the request decodes; the first token comes out of the next step
        as Generated, like any other (and ends the request if it is a stop token). `digests` are those of the blocks
        that came from elsewhere (those after the cached ones), or none."""

    def prefill_here(self, request_id: RequestId) -> None:
        """Prefill.ELSEWHERE, after Admitted: nobody else could do it; compute it here, in the same blocks."""

    def release(self, request_id: RequestId) -> None:
        """Prefill.ONLY, after Generated: the blocks have been sent and may become prefix cache."""

    def step(self) -> StepResult:
        """One batch: admits, computes, samples. Does nothing when `has_work` is false."""

    @property
    def has_work(self) -> bool: ...

    @property
    def patience_s(self) -> float | None:
        """`has_work` may become true by itself after so long; None: only by a call, or with a wake-up."""

    def set_wake(self, wake: Callable[[], None]) -> None:
        """`wake` is called, in any thread, when `has_work` has become true by what happened outside of the engine's
        thread."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Frees the model and the region."""
