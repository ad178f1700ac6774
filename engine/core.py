"""The engine itself: requests in, one batch a step, tokens out."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Generic, Protocol, TypeVar

import torch

from baton.clock import Clock, monotonic
from baton.errors import BatonError, InvalidRequest
from baton.ids import BlockHash, RequestId
from baton.layout import PROBE_BLOCKS
from baton.sampling import PositionLogprobs, SamplingParams
from baton.settings import WorkerSettings
from engine.batch import Draw, Drawn, Row
from engine.cache_journal import CacheJournal
from engine.device_region import DeviceRegion
from engine.digest_book import DigestBook
from engine.digests import Digester, RegionDigester
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
    StepResult,
    StepTiming,
)
from engine.kept_blocks import KeptBlocks
from engine.model.loader import LoadedModel, load_model
from engine.pool_size import pool_blocks
from engine.rows import draw_for, fresh_blocks, row_of, written_by
from engine.runner import ModelRunner, StepLogits, kv_layout
from engine.sampler import sample
from engine.scheduler import Chunk, Limits, Scheduler
from engine.self_test import measure_steps, step_shapes
from engine.sequence import LiveSequence, Stage, begin_sequence, check_request
from engine.stopwatch import Stopwatch, work_of
from kvcache.block_pool import BlockPool
from kvtransfer.interface import Region
from kvtransfer.region import HostRegion

log = logging.getLogger(__name__)


class Logits(Protocol):
    """What a forward pass leaves behind; its sampled rows are for the sampler alone."""

    @property
    def prompt_logprobs(self) -> Sequence[tuple[PositionLogprobs, ...]]:
        """For each row of the step, in order; empty where it did not ask."""


AnyLogits = TypeVar("AnyLogits", bound=Logits)
RunnerLogits = TypeVar("RunnerLogits", bound=Logits, covariant=True)
OnLayer = Callable[[int], None]


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
    ) -> None:
        """`seeds` gives the seed of each request that comes without one; `clock` times the steps. Without a digester
        the engine tells no digests."""
        assert model.context_length <= model.layout.pool_blocks * model.layout.block_tokens
        self.model, self.region = model, region
        self._runner, self._sample = runner, sample
        self._listener, self._seeds = listener, seeds
        self._journal = CacheJournal()
        self._digests = DigestBook(digester)
        pool = BlockPool(model.layout.pool_blocks, self._journal, self._digests)
        self._kept = KeptBlocks(pool)
        self._scheduler = Scheduler(pool, model.layout.block_tokens, limits)
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
        """Allocates a pool for a model."""
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
        runner, limits = ModelRunner(loaded, region), Limits.of(settings)
        return LocalEngine(model, region, runner, _sample, limits, listener, digester=digester)

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
            assert len(digests) in (0, len(sequence.blocks) - sequence.published)
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
        del self._sequences[sequence.request_id]
        self._commits.pop(sequence.request_id, None)
        self._digests.forget(sequence.request_id)

    # ---- blocks for others

    def hold(self, names: Sequence[BlockHash]) -> Held:
        blocks = self._kept.hold(names)
        return Held(blocks, self._digests.of(blocks))

    def let_go(self, held: Held) -> None:
        self._kept.let_go(held.blocks)

    # ---- steps

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._commits) or self._scheduler.can_admit

    def step(self) -> StepResult:
        result = self._step()
        changes = self._journal.take()
        return replace(result, cache_changes=changes) if changes else result

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
        """With the digests of what is cached where it is to be sent."""
        cached = sequence.blocks[: sequence.published] if sequence.prefill is Prefill.ONLY else ()
        blocks = tuple(sequence.blocks)
        return Admitted(sequence.request_id, blocks, sequence.cached_tokens, self._digests.of(cached))

    def _join(self, sequence: LiveSequence, commit: "_Commit") -> Generated:
        foreign = sequence.blocks[sequence.published :]
        self._scheduler.commit(sequence)
        if commit.digests:
            self._digests.note(foreign, commit.digests)
        return self._accept(sequence, commit.first)

    def _compute(self, chunks: Sequence[Chunk]) -> StepResult:
        """A failure costs the requests of this step, and nobody else: nothing of them was published yet."""
        self._steps += 1
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        written = [(chunk, event) for chunk in chunks for event in written_by(chunk, self.model.layout.block_tokens)]
        try:
            on_layer = self._on_layer([event for _, event in written])
            logits = self._runner.forward([row_of(chunk) for chunk in chunks], on_layer)
            self._digests.begin([fresh_blocks(chunk, event) for chunk, event in written])
            drawn = self._sample(logits, [draw_for(sequence) for sequence in sampling])
        except Exception as error:
            log.exception("A step of %d rows failed", len(chunks))
            self._stopwatch.reset()
            return self._fail([chunk.sequence for chunk in chunks], error)
        for chunk, logprobs in zip(chunks, logits.prompt_logprobs, strict=True):
            chunk.sequence.prompt_logprobs += logprobs
            self._scheduler.advance(chunk)
        work = work_of((chunk.start, chunk.end) for chunk in chunks)
        timing = self._stopwatch.end(work, is_done=bool(sampling) or self.region.is_host)
        digested = self._digests.take(wait=bool(sampling))  # the draw has waited for the device already
        return StepResult(generated=tuple(map(self._accept, sampling, drawn)), digested=digested, timing=timing)

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
        )

    def check_integrity(self) -> None:
        """Asserts that pool, scheduler and requests agree about who holds what. O(blocks)."""
        self._scheduler.check_integrity(self._sequences.values(), self._kept.holds().elements())
        assert self._digests.known().keys() == self._scheduler.pool.published()

    def close(self) -> None:
        self._runner.close()
        self.region.close()


def _digester_of(region: HostRegion | DeviceRegion) -> Digester:
    return RegionDigester(region) if isinstance(region, HostRegion) else region.digester


def _sample(logits: StepLogits, draws: Sequence[Draw]) -> list[Drawn]:
    return sample(logits.logits, draws)
