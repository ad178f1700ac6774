"""The engine itself: requests in, one batch a step, tokens out."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Generic

from baton.clock import Clock, monotonic
from baton.errors import BatonError, InvalidRequest
from baton.ids import BlockHash, RequestId, TenantTag
from baton.latency import DEFAULT_LATENCY, WorkerLatency
from baton.sampling import PositionLogprobs
from engine.batch import Drawn
from engine.cache_journal import CacheJournal
from engine.computing import AnyLogits, Runner, Sample, StepComputer
from engine.digest_book import DigestBook
from engine.digests import Digester
from engine.engine_stats import stats_of
from engine.filled_blocks import FilledBlocks
from engine.interface import (
    Admitted,
    EngineRequest,
    EngineStats,
    Failed,
    Generated,
    Held,
    LayerListener,
    ModelInfo,
    Prefill,
    Reserved,
    Retention,
    StepResult,
    StepTiming,
)
from engine.kept_blocks import KeptBlocks
from engine.prefix_cache import PrefixCache
from engine.restoring import next_check_s
from engine.scheduler import Chunk, Limits, Scheduler
from engine.self_test import measure_steps, step_shapes
from engine.sequence import LiveSequence, Stage, begin_sequence, check_request, owner_of, root_of
from engine.settler import Settler
from engine.telling import admission_of, generation_of
from engine.tier_pump import TierPump
from kvcache.block_hash import block_hashes
from kvcache.block_pool import BlockPool
from kvcache.restore_plan import DEFAULT_RESTORE, RestoreCosts
from kvcache.tiers.interface import LowerTiers
from kvtransfer.interface import Region

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Commit:
    """What another engine computed for a request."""

    first: Drawn
    digests: tuple[int, ...]


def draw_seed() -> int:
    return secrets.randbits(63)


class LocalEngine(Generic[AnyLogits]):
    """Implements engine.interface.Engine over a model in this process.

    A step either tells news or computes. News - who was admitted, and first tokens that other engines
    computed - is told at once and alone, because other workers wait for it; after it, the next step computes.
    So a request's Admitted always comes before the first call of the layer listener about it.
    """

    def __init__(
        self,
        model: ModelInfo,
        region: Region,
        runner: Runner[AnyLogits],
        sample: Sample[AnyLogits],
        limits: Limits,
        listener: LayerListener | None = None,
        seeds: Callable[[], int] = draw_seed,
        clock: Clock = monotonic,
        digester: Digester | None = None,
        tiers: LowerTiers | None = None,
    ) -> None:
        """`seeds` gives the seed of each request that comes without one; `clock` times the steps. Without a digester
        the engine tells no digests. `tiers`, below the pool, are the engine's from now on."""
        assert model.context_length <= model.layout.pool_blocks * model.layout.block_tokens
        self.model, self.region = model, region
        self.tiers, self._seeds, self._clock = tiers, seeds, clock
        self.latency: Callable[[], WorkerLatency] = lambda: DEFAULT_LATENCY
        """How long what takes on this worker: whoever measures it replaces this."""
        journal = CacheJournal()
        self._digests = DigestBook(digester, tiers.digested if tiers else None)
        pool = BlockPool(model.layout.pool_blocks, *([tiers] if tiers else []), journal, self._digests)
        self._pump = TierPump(tiers, pool, journal)
        layout = model.layout
        self._cache = PrefixCache(pool, layout.block_tokens, tiers, self.costs, layout.layers, clock)
        self._scheduler = Scheduler(pool, layout.block_tokens, limits, self._cache)
        self._kept = KeptBlocks(pool)
        self._filled = FilledBlocks(pool, self._cache, self._digests.note, self._scheduler.watermark)
        self._settler = Settler(self._scheduler, self._cache, self._filled, self._digests)
        self._computer = StepComputer(runner, sample, listener, self._settler, self._digests, region, clock)
        self._sequences: dict[RequestId, LiveSequence] = {}
        self._arrivals = count()
        self._commits: dict[RequestId, _Commit] = {}
        self._told_news = False
        self._steps = 0

    # ---- requests

    def add(self, request: EngineRequest) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequest("A request of this id is being served already.", "request_id")
        check_request(request, self.model)
        seed = self._seeds() if request.sampling.seed is None else request.sampling.seed
        sequence = begin_sequence(request, self.model, next(self._arrivals), seed)
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: RequestId) -> None:
        if sequence := self._sequences.get(request_id):
            self._forget(sequence)
            if not self._scheduler.running:
                self._computer.reset()

    def commit(
        self,
        request_id: RequestId,
        first_token: int,
        logprobs: tuple[PositionLogprobs, ...],
        digests: tuple[int, ...] = (),
    ) -> None:
        if sequence := self._sequences.get(request_id):
            assert sequence.stage is Stage.RESERVED and request_id not in self._commits
            assert len(digests) in (0, len(sequence.blocks) - sequence.found)
            self._commits[request_id] = _Commit(Drawn(first_token, logprobs[0] if logprobs else ()), digests)

    def abandon(self, request_id: RequestId) -> None:
        if sequence := self._sequences.get(request_id):
            self._kept.abandon(request_id, self._scheduler.abandon(sequence))
            self._drop(sequence)

    def reclaim(self, request_id: RequestId) -> None:
        self._kept.reclaim(request_id)

    def prefill_here(self, request_id: RequestId) -> None:
        if sequence := self._sequences.get(request_id):
            assert request_id not in self._commits
            self._scheduler.prefill_here(sequence)

    def release(self, request_id: RequestId) -> None:
        if sequence := self._sequences.get(request_id):
            assert sequence.stage is Stage.HELD
            self._forget(sequence)

    def _forget(self, sequence: LiveSequence) -> None:
        self._scheduler.remove(sequence)
        self._drop(sequence)

    def _drop(self, sequence: LiveSequence) -> None:
        self._pump.changed()
        del self._sequences[sequence.request_id]
        self._commits.pop(sequence.request_id, None)
        self._digests.forget(sequence.request_id)

    # ---- blocks for others

    def hold(self, names: Sequence[BlockHash]) -> Held:
        blocks = self._kept.hold(names)
        return Held(blocks, self._digests.of(blocks))

    def let_go(self, held: Held) -> None:
        self._kept.let_go(held.blocks)

    def promote(self, names: Sequence[BlockHash], on_done: Callable[[], None]) -> bool:
        return self.tiers is not None and self._filled.promote(names, on_done)

    def reserve(self, prompt: Sequence[int], cache_salt: str, blocks_max: int) -> Reserved:
        block_tokens = self.model.layout.block_tokens
        blocks = min(blocks_max, (len(prompt) - 1) // block_tokens) if self._scheduler.limits.prefix_cache else 0
        root = root_of(self.model, cache_salt)
        return self._filled.reserve(root, block_hashes(root, prompt[: blocks * block_tokens], block_tokens))

    def adopt(self, reserved: Reserved, digests: Sequence[int], owner: Retention) -> None:
        self._filled.adopt(reserved, digests, owner_of(owner))
        self._pump.want()

    def clear_cache(self, tenant: TenantTag | None) -> tuple[int, int]:
        self._filled.clear(tenant)
        blocks = self._cache.clear(tenant)  # first: what is flushed after the lower tiers' turn goes down again
        size_bytes = blocks * self.model.layout.block_bytes
        self._pump.want()  # a turn, in which the cluster is told
        if self.tiers is None:
            return blocks, size_bytes
        below, below_bytes = self.tiers.clear(tenant)
        return blocks + below, size_bytes + below_bytes

    # ---- steps

    @property
    def has_work(self) -> bool:
        return (
            bool(self._commits)
            or self._pump.is_wanted
            or self._scheduler.can_compute
            or self._scheduler.can_admit
            or self.patience_s == 0
        )

    @property
    def patience_s(self) -> float | None:
        """See engine.interface.Engine."""
        check_s = next_check_s([*self._cache.restoring.values(), *self._filled.restoring])
        return None if check_s is None else max(0.0, check_s - self._clock())

    def set_wake(self, wake: Callable[[], None]) -> None:
        self._pump.on_wake(wake)

    def step(self) -> StepResult:
        self._settler.settle()
        failed = self._fail_broken()
        self._pump.turn()
        result = self._step()
        failed += self._fail_broken()
        if result or failed:
            self._pump.changed()
        changes, restored = self._pump.take_changes(), self._settler.take_timings()
        if not (failed or restored or changes):
            return result
        return replace(result, failed=(*failed, *result.failed), restored=restored, cache_changes=changes)

    def _step(self) -> StepResult:
        if not (self._told_news and self._scheduler.running):
            news = self._news()
            self._told_news = bool(news)
            if self._told_news:
                return news
        self._told_news = False
        self._computer.begin()
        chunks = self._scheduler.schedule()
        if chunks:
            return self._compute(chunks)
        self._computer.reset()
        return StepResult()

    def _news(self) -> StepResult:
        admitted = [self._admitted(sequence) for sequence in self._scheduler.admit() if not sequence.preemptions]
        commits, self._commits = self._commits, {}
        generated = [self._join(self._sequences[request_id], commit) for request_id, commit in commits.items()]
        return StepResult(tuple(admitted), tuple(generated))

    def _admitted(self, sequence: LiveSequence) -> Admitted:
        """With the digests of what is cached in HBM where it is to be sent."""
        cached = sequence.blocks[: sequence.published] if sequence.prefill is Prefill.ONLY else ()
        return admission_of(sequence, self._digests.of(cached), self.model.layout.block_tokens)

    def _join(self, sequence: LiveSequence, commit: "_Commit") -> Generated:
        foreign = sequence.blocks[sequence.found :]
        self._scheduler.commit(sequence)
        if commit.digests:
            self._digests.note(foreign, commit.digests)
        return self._accept(sequence, commit.first)

    def _compute(self, chunks: Sequence[Chunk]) -> StepResult:
        """A failure costs the requests of this step, and nobody else: nothing of them was published yet."""
        self._steps += 1
        try:
            computed = self._computer.compute(chunks)
        except Exception as error:
            log.exception("A step of %d rows failed", len(chunks))
            self._computer.reset()
            return self._fail([chunk.sequence for chunk in chunks], error)
        for chunk, logprobs in zip(computed.right, computed.prompt_logprobs, strict=True):
            chunk.sequence.prompt_logprobs += logprobs
            self._scheduler.advance(chunk)
        digested = self._digests.take(wait=bool(computed.sampled))  # the draw has waited for the device already
        generated = tuple(map(self._accept, computed.sampled, computed.drawn))
        return StepResult(generated=generated, digested=digested, timing=computed.timing)

    def _accept(self, sequence: LiveSequence, drawn: Drawn) -> Generated:
        sequence.append(drawn.token_id)
        generated = generation_of(sequence, drawn)
        if generated.finish_reason is not None:
            self._end(sequence)
        return generated

    def _end(self, sequence: LiveSequence) -> None:
        if sequence.prefill is Prefill.ONLY:
            self._scheduler.hold(sequence)
        else:
            self._forget(sequence)

    def _fail(self, sequences: Sequence[LiveSequence], error: Exception) -> StepResult:
        reason = BatonError(f"The engine failed while it computed this request ({type(error).__name__}).")
        for sequence in sequences:
            self._forget(sequence)
        return StepResult(failed=tuple(Failed(sequence.request_id, reason) for sequence in sequences))

    def costs(self) -> RestoreCosts:
        """Of bringing up and of computing, as far as is known by now."""
        layout, latency = self.model.layout, self.latency()
        latency = replace(latency, restore={**DEFAULT_RESTORE, **latency.restore})
        return RestoreCosts(latency, layout.block_tokens, layout.block_bytes, self._scheduler.limits.chunk_tokens)

    def _fail_broken(self) -> list[Failed]:
        """Requests of which others were told what then could not be restored."""
        broken = [s for s in self._settler.take_broken() if self._sequences.get(s.request_id) is s]
        for sequence in broken:
            self._forget(sequence)
        error = BatonError("Cached KV that was to be sent could not be read any more.")
        return [Failed(sequence.request_id, error) for sequence in broken]

    # ---- the self-test

    def self_test(self) -> tuple[StepTiming, ...]:
        """Measures steps of many sizes, for `self_test.SECONDS_MAX` or so. Only before the first request: it uses
        free blocks and frees them. It leaves nothing in the prefix cache and tells no listener."""
        limits, model, pool = self._scheduler.limits, self.model, self._scheduler.pool
        shapes = step_shapes(model.layout, model.context_length, limits.chunk_tokens, limits.sequences_max)
        blocks = pool.allocate(pool.free)
        try:
            measure = self._computer.measure
            return measure_steps(shapes, blocks, model.layout, model.vocabulary_size, measure, self._clock)
        finally:
            pool.release(blocks)

    # ---- state

    def stats(self) -> EngineStats:
        return stats_of(self._scheduler, self._cache, self._steps)

    def check_integrity(self) -> None:
        """Asserts that pool, scheduler and requests agree about who holds what. O(blocks)."""
        kept = self._kept.holds() + self._filled.holds() + self._pump.holds()
        self._scheduler.check_integrity(self._sequences.values(), kept.elements())
        assert self._digests.known().keys() == self._scheduler.pool.published()
        if self.tiers is not None:
            self.tiers.check_integrity()

    def close(self) -> None:
        self._filled.close()
        for sequence in tuple(self._cache.restoring):
            self._cache.cancel(sequence)
        if self.tiers is not None:
            self.tiers.close()
        self._computer.close()
        self.region.close()
