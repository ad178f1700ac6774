"""Sees to restores that have ended: what is right becomes prefix cache, what is not is computed."""

import logging
from collections.abc import Sequence

from engine.digest_book import DigestBook
from engine.filled_blocks import FilledBlocks
from engine.prefix_cache import PrefixCache
from engine.restoring import RestoreGate
from engine.scheduler import Chunk, Scheduler
from engine.sequence import LiveSequence
from kvcache.tiers.interface import RestoreTiming

log = logging.getLogger(__name__)


class Settler:
    def __init__(self, scheduler: Scheduler, cache: PrefixCache, filled: FilledBlocks, digests: DigestBook) -> None:
        self._scheduler, self._cache, self._filled, self._digests = scheduler, cache, filled, digests
        self._timings: list[RestoreTiming] = []
        self._broken: list[LiveSequence] = []

    def settle(self) -> None:
        """Between two steps: those that have ended by now, and those that have turned slow, which are given up."""
        if restoring := self._cache.restoring:
            self._cache.give_up_slow(restoring.values())
            for sequence in [sequence for sequence, its in restoring.items() if its.is_over]:
                self._settle(sequence)
        self._timings += self._filled.settle()

    def settle_step(self, gate: RestoreGate, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """After a forward pass: the chunks that were computed from what they should be. Waits for the verdict."""
        if not gate.has_restores:
            return chunks
        gate.wait_for_all()
        for chunk in chunks:
            if chunk.sequence.restoring is not None:
                self._settle(chunk.sequence)
        return [c for c in chunks if c.sequence not in self._broken and c.sequence.computed == c.start]

    def _settle(self, sequence: LiveSequence) -> None:
        restoring = sequence.restoring
        assert restoring is not None
        restored = restoring.restore.result
        assert restored is not None
        blocks = [sequence.blocks[index] for index in restoring.filled[: restored.good]]
        if not self._scheduler.settle(sequence):
            self._broken.append(sequence)
        if restored.digests:
            self._digests.note(blocks, restored.digests)
        self._timings += restored.timings
        if restored.reason:
            bad, wanted = len(restoring.filled) - restored.good, len(restoring.filled)
            log.warning("%d of %d blocks could not be restored: %s", bad, wanted, restored.reason)

    # ---- what the engine tells of it

    def take_timings(self) -> tuple[RestoreTiming, ...]:
        taken, self._timings = tuple(self._timings), []
        return taken

    def take_broken(self) -> Sequence[LiveSequence]:
        """Sequences that cannot go on; their blocks are still theirs."""
        taken, self._broken = self._broken, []
        return taken
