"""Which sequences take part in a step, and with which blocks: continuous batching over a block pool.

Pure and synchronous. First come, first served: whoever arrived first is admitted first, computed first
and preempted last, so the oldest running sequence always gets on, and every sequence becomes the oldest. Only who
waits for what is just being restored for another is overtaken meanwhile.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from baton.errors import Overloaded
from baton.ids import BlockHash, BlockId
from baton.settings import WorkerSettings
from engine.interface import Prefill
from engine.prefix_cache import PrefixCache
from engine.sequence import LiveSequence, Stage
from engine.waiting_line import WaitingLine
from kvcache.block_pool import BlockPool

WATERMARK_DIVISOR = 64
"""One block in so many stays free at admission, for those that run to grow into."""
OVERTAKEN_MAX = 8
"""So many that wait for restores of others are overtaken at a time by those who came after them. They lose no more than
the blocks that these take: such a restore ends, or is given up."""


@dataclass(frozen=True, slots=True)
class Limits:
    chunk_tokens: int
    """Tokens of a step; decode rows come first, see `Scheduler.schedule`."""
    sequences_max: int
    """Sequences that run or hold reserved blocks."""
    waiting_max: int
    prefix_cache: bool = True

    @classmethod
    def of(cls, settings: WorkerSettings) -> "Limits":
        return cls(settings.chunk_tokens, settings.sequences_max, settings.waiting_max, settings.prefix_cache)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the tokens `[start, end)` of a sequence in this step."""

    sequence: LiveSequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether it ends what is known of the sequence, so that the next token can be drawn."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """A step is `admit`, `schedule`, then `advance` with what was computed, and `finish` for those that ended."""

    def __init__(self, pool: BlockPool, block_tokens: int, limits: Limits, cache: PrefixCache | None = None) -> None:
        """`cache`: over the same pool, where there are tiers below it."""
        self.pool, self.block_tokens, self.limits = pool, block_tokens, limits
        self.cache = cache or PrefixCache(pool, block_tokens)
        self.waiting = WaitingLine(block_tokens)
        self.running: list[LiveSequence] = []
        self.reserved: set[LiveSequence] = set()
        self.preemptions = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.recomputed_tokens = 0
        self.watermark = max(1, pool.total // WATERMARK_DIVISOR)

    # ---- the queue

    def add(self, sequence: LiveSequence) -> None:
        """Raises Overloaded if as many wait as may."""
        if len(self.waiting) >= self.limits.waiting_max:
            raise Overloaded(f"{len(self.waiting)} requests wait already, as many as may; try again later.")
        self.waiting.join(sequence)

    @property
    def can_admit(self) -> bool:
        return self._next() is not None

    def admit(self) -> list[LiveSequence]:
        """Gives those who came first blocks for all their tokens, as long as there are enough."""
        admitted = []
        while (sequence := self._next()) is not None:
            self.waiting.leave(sequence)
            admitted.append(self._place(sequence))
        return admitted

    def _next(self) -> LiveSequence | None:
        """Whoever came first and does not wait for what is being restored for another. Nobody, if that one does not
        fit."""
        if len(self.running) + len(self.reserved) >= self.limits.sequences_max:
            return None
        for sequence in islice(self.waiting, 1 + OVERTAKEN_MAX):
            if not self.cache.is_coming(self._reusable(sequence)):
                return sequence if self._fits(sequence) else None
        return None

    def _reusable(self, sequence: LiveSequence) -> Sequence[BlockHash]:
        """The names of what it might find: whole blocks, and not the last token, whose logits are needed."""
        if not self.limits.prefix_cache or sequence.wants_prompt_logprobs:
            return ()
        return sequence.block_names()[: (len(sequence.tokens) - 1) // self.block_tokens]

    def _fits(self, sequence: LiveSequence) -> bool:
        """Whatever it finds in lower tiers, or in the pool behind that, takes blocks as if it were computed."""
        match = self.pool.match(self._reusable(sequence))
        lacking = self._blocks_for(len(sequence.tokens)) - len(match.blocks)
        reserve = self.watermark if self.running or self.reserved else 0
        return lacking + reserve <= self.pool.available - match.idle

    def _place(self, sequence: LiveSequence) -> LiveSequence:
        self.cache.take(sequence, self._reusable(sequence), self._blocks_for(len(sequence.tokens)))
        if sequence.preemptions:
            self.recomputed_tokens += max(0, sequence.lost_tokens - sequence.computed)
        else:
            sequence.cached_tokens = sequence.computed
            self.prefix_queries_tokens += len(sequence.tokens)
            self.prefix_hits_tokens += sequence.computed
        if sequence.prefill is Prefill.ONLY and sequence.restoring:
            sequence.untold = sequence.published
        if sequence.prefill is Prefill.ELSEWHERE:
            sequence.stage = Stage.RESERVED
            self.reserved.add(sequence)
        else:
            self._run(sequence)
        return sequence

    def _run(self, sequence: LiveSequence) -> None:
        sequence.stage = Stage.RUNNING
        insort(self.running, sequence, key=_arrival)

    # ---- a step

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, with blocks for all of them.

        Every sequence with one token to compute takes part. Prompts share what these leave of
        `chunk_tokens`, at least a block's worth, so that neither starves the other. Whose restore the step might have
        to wait for takes no part yet.
        """
        self._make_room()
        chunks = [Chunk(s, s.computed, s.computed + 1) for s in self.running if s.remaining == 1]
        chunks = [chunk for chunk in chunks if self._may_join(chunk)]
        least = min(self.block_tokens, self.limits.chunk_tokens)
        budget = max(self.limits.chunk_tokens - len(chunks), least)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                chunk = self._prompt_chunk(sequence, budget)
                if self._may_join(chunk):
                    budget -= chunk.end - chunk.start
                    chunks.append(chunk)
        return chunks

    def _may_join(self, chunk: Chunk) -> bool:
        return self.cache.keeps_ahead(chunk.sequence, chunk.start, chunk.end)

    @property
    def can_compute(self) -> bool:
        """Some sequence takes part in the next step for sure. Those that wait for their restores may, too."""
        return any(sequence.restoring is None for sequence in self.running)

    def _prompt_chunk(self, sequence: LiveSequence, budget: int) -> Chunk:
        """Ends with the sequence's tokens or, where the budget allows, at the end of a block: whole blocks can
        be sent and published at once."""
        start, length = sequence.computed, len(sequence.tokens)
        end = start + budget
        if end >= length:
            return Chunk(sequence, start, length)
        aligned = end - end % self.block_tokens
        return Chunk(sequence, start, aligned if aligned > start else end)

    def _make_room(self) -> None:
        """Gives those whose last block is full another, oldest first; the youngest pay with theirs."""
        for sequence in tuple(self.running):
            while sequence.stage is Stage.RUNNING and (lacking := self._lacking(sequence)):
                if lacking <= self.pool.available:
                    self._grow(sequence, lacking)
                else:
                    self._preempt(self._youngest())

    def _lacking(self, sequence: LiveSequence) -> int:
        """One block as it grows; more where a restore failed."""
        return self._blocks_for(len(sequence.tokens)) - len(sequence.blocks)

    def _grow(self, sequence: LiveSequence, count: int) -> None:
        sequence.blocks += self.pool.allocate(count, after=sequence.blocks[-1] if sequence.blocks else None)

    def _youngest(self) -> LiveSequence:
        """Whoever may be preempted and came last. The blocks of Prefill.ONLY are being sent, and whoever asks
        for room is of another kind: so there always is one."""
        return next(s for s in reversed(self.running) if s.prefill is not Prefill.ONLY)

    def _preempt(self, sequence: LiveSequence) -> None:
        """Back to the queue, at its place by arrival; what it published stays cached as long as space allows, and goes
        down to lower tiers then."""
        self.running.remove(sequence)
        sequence.lost_tokens = sequence.computed
        self._release_blocks(sequence)
        sequence.stage = Stage.WAITING
        sequence.preemptions += 1
        sequence.prompt_logprobs.clear()
        self.preemptions += 1
        self.waiting.rejoin(sequence)

    def advance(self, chunk: Chunk) -> None:
        """The chunk's keys and values lie in the sequence's blocks."""
        chunk.sequence.computed = chunk.end
        self._publish(chunk.sequence)

    def _publish(self, sequence: LiveSequence) -> None:
        """Makes what is final known to the prefix cache: the blocks that are full of computed tokens."""
        full = sequence.computed // self.block_tokens
        self._publish_blocks(sequence, sequence.published, full)
        sequence.published = full

    def _publish_blocks(self, sequence: LiveSequence, first: int, end: int) -> None:
        if self.limits.prefix_cache:
            self.cache.publish(sequence, first, end)

    # ---- what comes up from lower tiers

    def settle(self, sequence: LiveSequence) -> bool:
        """A sequence's restore has ended. What is right is published; from the first block on that is not, all is
        computed here. False: that cannot be done, because somebody has been told of it already."""
        restoring = sequence.restoring
        assert restoring is not None
        restored = restoring.restore.result
        assert restored is not None
        right = restoring.right_blocks(restored)
        if not restoring.is_void:
            self._publish_blocks(sequence, sequence.published, right)
        if not sequence.preemptions:
            sequence.restored_tokens = restored.good * self.block_tokens
            sequence.restore_s = self.cache.since_s(restoring)
        self.cache.forget(sequence)
        if right == restoring.end:
            sequence.published = sequence.computed // self.block_tokens
            return True
        sequence.published = right
        return self._compute_from(sequence, right, is_own=not restoring.shares_after(right))

    def _compute_from(self, sequence: LiveSequence, right: int, *, is_own: bool) -> bool:
        """Only the first `right` blocks are as they should be; `is_own`: nobody else reads those after them."""
        if sequence.preemptions:
            self.recomputed_tokens += sequence.computed - right * self.block_tokens
        else:
            sequence.cached_tokens = right * self.block_tokens
        if sequence.stage is Stage.RESERVED:
            sequence.broken_at = right
        elif sequence.prefill is Prefill.ONLY:
            is_told, sequence.found = sequence.untold is None, right
            sequence.computed = right * self.block_tokens
            return is_own and not is_told
        else:
            self._cut_back(sequence, right)
        return True

    def _cut_back(self, sequence: LiveSequence, blocks: int) -> None:
        """Gives back all after the first `blocks`: `schedule` finds others."""
        self.pool.release(sequence.blocks[blocks:])
        del sequence.blocks[blocks:]
        sequence.computed = blocks * self.block_tokens
        sequence.published = min(sequence.published, blocks)

    # ---- leaving, and changing course

    def commit(self, sequence: LiveSequence) -> None:
        """A reserved sequence's blocks, but for those it found itself, have been filled with its whole prompt; it runs
        from here on."""
        broken_at = sequence.broken_at
        self._leave_reserved(sequence)
        full = len(sequence.tokens) // self.block_tokens
        if sequence.restoring is None and broken_at is None:
            sequence.computed = len(sequence.tokens)
            self._publish(sequence)
            return
        self._publish_blocks(sequence, sequence.found, full)
        if broken_at is None:
            sequence.computed = len(sequence.tokens)
        else:
            self._cut_back(sequence, broken_at)

    def prefill_here(self, sequence: LiveSequence) -> None:
        """A reserved sequence is computed here after all, in the same blocks."""
        broken_at = sequence.broken_at
        self._leave_reserved(sequence)
        if broken_at is not None:
            self._cut_back(sequence, broken_at)

    def _leave_reserved(self, sequence: LiveSequence) -> None:
        assert sequence.stage is Stage.RESERVED
        self.reserved.remove(sequence)
        sequence.prefill, sequence.broken_at = Prefill.HERE, None
        self._run(sequence)

    def hold(self, sequence: LiveSequence) -> None:
        """A sequence takes part no more, but keeps its blocks until it is removed."""
        self.running.remove(sequence)
        sequence.stage = Stage.HELD

    def remove(self, sequence: LiveSequence) -> None:
        """Forgets a sequence in any stage, and frees its blocks."""
        if sequence.stage is Stage.WAITING:
            self.waiting.leave(sequence)
        elif sequence.stage is Stage.RESERVED:
            self.reserved.remove(sequence)
        elif sequence.stage is Stage.RUNNING:
            self.running.remove(sequence)
        self._release_blocks(sequence)

    def abandon(self, sequence: LiveSequence) -> list[BlockId]:
        """Forgets a reserved sequence. What of its blocks was not cached stays held, by the caller from now on."""
        assert sequence.stage is Stage.RESERVED
        self.cache.cancel(sequence)
        kept = sequence.blocks[sequence.published :]
        del sequence.blocks[sequence.published :]
        self.remove(sequence)
        return kept

    def _release_blocks(self, sequence: LiveSequence) -> None:
        self.cache.cancel(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    @property
    def waiting_tokens(self) -> int:
        """Tokens still to compute before those who wait or prefill can draw their next."""
        return self.waiting.tokens + sum(s.remaining for s in self.running if s.remaining > 1)

    @property
    def waiting_token_context(self) -> float:
        """The sum of `new * context` over these, as PrefillCost has it."""
        begun = sum(s.remaining * (s.computed + s.remaining / 2) for s in self.running if s.remaining > 1)
        return self.waiting.token_context + begun

    @property
    def kv_blocks_wanted(self) -> int:
        """That those who wait will hold."""
        return self.waiting.kv_blocks

    @property
    def kv_tokens(self) -> int:
        return sum(s.computed for s in self.running)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def check_integrity(self, sequences: Iterable[LiveSequence], kept: Iterable[BlockId] = ()) -> None:
        """Asserts that these sequences are all there is, and that they hold just the blocks that they should; the
        others that are held are `kept`, as often as they are named. O(blocks)."""
        self.pool.check_integrity()
        by_stage: dict[Stage, list[LiveSequence]] = {stage: [] for stage in Stage}
        for sequence in sequences:
            by_stage[sequence.stage].append(sequence)
        assert sorted(by_stage[Stage.WAITING], key=_arrival) == list(self.waiting), "the queue is not in order"
        assert sorted(by_stage[Stage.RUNNING], key=_arrival) == self.running
        anew = WaitingLine(self.block_tokens)
        for sequence in self.waiting:
            anew.join(sequence)
        line = self.waiting
        assert (line.tokens, line.token_context, line.kv_blocks) == (anew.tokens, anew.token_context, anew.kv_blocks)
        assert set(by_stage[Stage.RESERVED]) == self.reserved
        holders = Counter(chain(kept, *(sequence.blocks for sequence in chain(*by_stage.values()))))
        assert holders == self.pool.holders(), "blocks are leaked or owned by nobody"
        for sequence in self.running:
            assert sequence.computed < len(sequence.tokens), "nothing left to compute"
        restoring = {s: s.restoring for s in chain(*by_stage.values()) if s.restoring is not None}
        assert restoring == self.cache.restoring
        for sequence in self.running:
            assert sequence.published <= sequence.computed // self.block_tokens or not self.limits.prefix_cache


def _arrival(sequence: LiveSequence) -> int:
    return sequence.arrival
