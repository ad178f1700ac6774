"""The engine itself: requests in, one batch a step, tokens out."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Generic, Protocol, Self, TypeVar

import torch

from baton.clock import Clock, monotonic
from baton.errors import BatonError, InvalidRequest
from baton.ids import BlockHash, RequestId, TenantTag
from baton.latency import DEFAULT_LATENCY, WorkerLatency
from baton.layout import PROBE_BLOCKS
from baton.sampling import PositionLogprobs, SamplingParams
from baton.settings import WorkerSettings
from engine.batch import Draw, Drawn, Row
from engine.cache_journal import CacheJournal
from engine.device_region import DeviceRegion
from engine.digest_book import DigestBook
from engine.digests import Digester, RegionDigester
from engine.filled_blocks import FilledBlocks
from engine.interface import (
    Admitted,
    BlocksWritten,
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
from engine.model.loader import LoadedModel, load_model
from engine.pool_size import pool_blocks
from engine.prefix_cache import PrefixCache
from engine.restoring import RestoreGate, next_check_s
from engine.rows import draw_for, fresh_blocks, restored_before, row_of, written_by
from engine.runner import ModelRunner, StepLogits, kv_layout
from engine.sampler import sample
from engine.scheduler import Chunk, Limits, Scheduler
from engine.self_test import measure_steps, step_shapes
from engine.sequence import LiveSequence, Stage, begin_sequence, check_request, owner_of, root_of
from engine.settler import Settler
from engine.stopwatch import Stopwatch, work_of
from engine.tier_pump import TierPump
from engine.tiers import LateCosts, open_lower_tiers
from kvcache.block_hash import block_hashes
from kvcache.block_pool import BlockPool
from kvcache.restore_plan import DEFAULT_RESTORE, RestoreCosts
from kvcache.tiers.interface import LowerTiers
from kvtransfer.interface import Region
from kvtransfer.region import HostRegion

log = logging.getLogger(__name__)


class Logits(Protocol):
    """What a forward pass leaves behind; its sampled rows are for the sampler alone."""

    @property
    def prompt_logprobs(self) -> Sequence[tuple[PositionLogprobs, ...]]:
        """For each row of the step, in order; empty where it did not ask."""

    def only(self, rows: Sequence[int], sampled: Sequence[int]) -> Self:
        """Those of these rows; `sampled`: which of the rows that sample they are."""


AnyLogits = TypeVar("AnyLogits", bound=Logits)
RunnerLogits = TypeVar("RunnerLogits", bound=Logits, covariant=True)
OnLayer = Callable[[int], None]


WAITED_MAX_S = 0.0005
"""A step that was held up by more than this says nothing of how long computing takes."""


@dataclass(frozen=True, slots=True)
class _Commit:
    """What another engine computed for a request."""

    first: Drawn
    digests: tuple[int, ...]


class Runner(Protocol[RunnerLogits]):
    def forward(self, rows: Sequence[Row], on_layer: OnLayer | None) -> RunnerLogits:
        """Computes the rows, writing their keys and values; calls `on_layer` as each layer's lie in the region."""

    def close(self) -> None:
        """Lets go of the region."""


Sample = Callable[[AnyLogits, Sequence[Draw]], list[Drawn]]
"""One token for each row that samples, in order."""


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
        self._runner, self._sample = runner, sample
        self._listener, self._seeds = listener, seeds
        self.tiers = tiers
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
        self._clock, self._stopwatch = clock, Stopwatch(clock)
        self._sequences: dict[RequestId, LiveSequence] = {}
        self._arrivals = count()
        self._commits: dict[RequestId, _Commit] = {}
        self._told_news = False
        self._steps = 0

    @staticmethod
    def load(settings: WorkerSettings, listener: LayerListener | None = None) -> "LocalEngine[StepLogits]":
        """Loads the model and allocates its pool. Raises SettingsError, UnsupportedModel or TransferError."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        return LocalEngine.of(loaded, settings, listener)

    @staticmethod
    def of(
        loaded: LoadedModel, settings: WorkerSettings, listener: LayerListener | None = None
    ) -> "LocalEngine[StepLogits]":
        """Allocates a pool for a model, and opens the tiers below it. Raises SettingsError."""
        facts, block_tokens = loaded.facts, settings.block_tokens
        limit = min(facts.context_length, settings.context_length_max or facts.context_length)
        block_bytes = kv_layout(loaded, block_tokens, 1).block_bytes
        blocks = pool_blocks(settings, block_bytes, limit, loaded.device)
        layout = kv_layout(loaded, block_tokens, blocks + PROBE_BLOCKS)
        region = HostRegion.allocate(layout) if loaded.device.type == "cpu" else DeviceRegion(layout, loaded.device)
        model = ModelInfo(
            name=settings.model_name,
            fingerprint=facts.fingerprint,
            context_length=min(limit, blocks * block_tokens),
            vocabulary_size=facts.vocabulary_size,
            eos_token_ids=facts.eos_token_ids,
            layout=layout,
        )
        digester = None if settings.verify == "never" else _digester_of(region)
        costs = LateCosts()
        tiers = open_lower_tiers(settings, model, region, costs)
        runner, limits = ModelRunner(loaded, region), Limits.of(settings)
        engine = LocalEngine(model, region, runner, _sample, limits, listener, digester=digester, tiers=tiers)
        costs.costs = engine.costs
        return engine

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
                self._stopwatch.reset()

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
        blocks = self._cache.clear(tenant)
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
        self._stopwatch.begin()
        chunks = self._scheduler.schedule()
        if chunks:
            return self._compute(chunks)
        self._stopwatch.reset()
        return StepResult()

    def _news(self) -> StepResult:
        admitted = [self._admitted(sequence) for sequence in self._scheduler.admit() if not sequence.preemptions]
        commits, self._commits = self._commits, {}
        generated = [self._join(self._sequences[request_id], commit) for request_id, commit in commits.items()]
        return StepResult(tuple(admitted), tuple(generated))

    def _admitted(self, sequence: LiveSequence) -> Admitted:
        """With the digests of what is cached in HBM where it is to be sent."""
        cached = sequence.blocks[: sequence.published] if sequence.prefill is Prefill.ONLY else ()
        restoring = (sequence.found - sequence.published) * self.model.layout.block_tokens
        return Admitted(
            sequence.request_id,
            tuple(sequence.blocks),
            sequence.cached_tokens,
            self._digests.of(cached),
            restoring_tokens=restoring if sequence.restoring else 0,
        )

    def _join(self, sequence: LiveSequence, commit: "_Commit") -> Generated:
        foreign = sequence.blocks[sequence.found :]
        self._scheduler.commit(sequence)
        if commit.digests:
            self._digests.note(foreign, commit.digests)
        return self._accept(sequence, commit.first)

    def _compute(self, chunks: Sequence[Chunk]) -> StepResult:
        """A failure costs the requests of this step, and nobody else: nothing of them was published yet."""
        self._steps += 1
        gate = RestoreGate([r for chunk in chunks if (r := chunk.sequence.restoring)], self._clock)
        restored = [(chunk, event) for chunk in chunks for event in restored_before(chunk)]
        written = [(chunk, event) for chunk in chunks for event in written_by(chunk, self.model.layout.block_tokens)]
        events = [*restored, *written]
        try:
            on_layer = self._on_layer([event for _, event in events])
            logits = self._runner.forward([row_of(chunk) for chunk in chunks], gate.before(on_layer))
            right = self._settler.settle_step(gate, chunks)
            if len(right) < len(chunks):
                sampled = [chunk for chunk in chunks if chunk.samples]
                rows = [index for index, chunk in enumerate(chunks) if chunk in right]
                logits = logits.only(rows, [index for index, chunk in enumerate(sampled) if chunk in right])
            sampling = [chunk.sequence for chunk in right if chunk.samples]
            self._digests.begin([fresh_blocks(chunk, event) for chunk, event in events if chunk in right])
            drawn = self._sample(logits, [draw_for(sequence) for sequence in sampling])
        except Exception as error:
            log.exception("A step of %d rows failed", len(chunks))
            self._stopwatch.reset()
            return self._fail([chunk.sequence for chunk in chunks], error)
        for chunk, logprobs in zip(right, logits.prompt_logprobs, strict=True):
            chunk.sequence.prompt_logprobs += logprobs
            self._scheduler.advance(chunk)
        timing = self._timing(chunks, gate, is_done=bool(sampling) or self.region.is_host)
        digested = self._digests.take(wait=bool(sampling))  # the draw has waited for the device already
        return StepResult(generated=tuple(map(self._accept, sampling, drawn)), digested=digested, timing=timing)

    def _timing(self, chunks: Sequence[Chunk], gate: RestoreGate, *, is_done: bool) -> StepTiming | None:
        """Nothing of a step that waited for what it restored: it would not be the computing that was measured."""
        if gate.waited_s > WAITED_MAX_S:
            self._stopwatch.reset()
            return None
        return self._stopwatch.end(work_of((chunk.start, chunk.end) for chunk in chunks), is_done=is_done)

    def _on_layer(self, written: Sequence[BlocksWritten]) -> OnLayer | None:
        listener = self._listener
        if listener is None or not written:
            return None
        return lambda layer: listener(layer, written)

    def _accept(self, sequence: LiveSequence, drawn: Drawn) -> Generated:
        sequence.append(drawn.token_id)
        reason = sequence.finish_reason
        wants_prompt = len(sequence.output) == 1 and sequence.request.sampling.prompt_logprobs is not None
        generated = Generated(
            sequence.request_id,
            (drawn.token_id,),
            reason,
            logprobs=() if sequence.request.sampling.logprobs is None else (drawn.logprobs,),
            prompt_logprobs=((), *sequence.prompt_logprobs) if wants_prompt else (),
            cached_tokens=sequence.cached_tokens,
            preemptions=sequence.preemptions,
            restored_tokens=sequence.restored_tokens,
            restore_s=sequence.restore_s,
        )
        if reason is not None:
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
            return measure_steps(shapes, blocks, model.layout, model.vocabulary_size, self._measure, self._clock)
        finally:
            pool.release(blocks)

    def _measure(self, rows: Sequence[Row]) -> StepTiming:
        greedy = SamplingParams(temperature=0)
        spans = [(row.start, row.start + len(row.token_ids)) for row in rows]
        draws = [Draw(greedy, 0, range(end), (), frozenset()) for _, end in spans]
        began_s = self._clock()
        self._sample(self._runner.forward(rows, None), draws)
        return StepTiming(work_of(spans), self._clock() - began_s)

    # ---- state

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._scheduler.pool
        return EngineStats(
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting) + len(scheduler.reserved),
            waiting_tokens=scheduler.waiting_tokens,
            waiting_token_context=scheduler.waiting_token_context,
            kv_tokens=scheduler.kv_tokens,
            kv_blocks_total=pool.total,
            kv_blocks_used=pool.used,
            kv_blocks_wanted=scheduler.kv_blocks_wanted,
            kv_blocks_cached=pool.cached,
            prefix_queries_tokens=scheduler.prefix_queries_tokens,
            prefix_hits_tokens=scheduler.prefix_hits_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            tier_hits_tokens=dict(self._cache.hits_tokens),
            recomputed_tokens=scheduler.recomputed_tokens,
        )

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
        self._runner.close()
        self.region.close()


def _digester_of(region: HostRegion | DeviceRegion) -> Digester:
    return RegionDigester(region) if isinstance(region, HostRegion) else region.digester


def _sample(logits: StepLogits, draws: Sequence[Draw]) -> list[Drawn]:
    return sample(logits.logits, draws)
