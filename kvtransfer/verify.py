"""Compares blocks where they landed with the digests they were sent with, before anybody may read them."""

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Literal

from prometheus_client import CollectorRegistry, Counter

from baton.clock import Clock, monotonic
from baton.ids import BlockId
from kvtransfer.interface import Region

Policy = Literal["always", "sampled", "never"]

SAMPLED_SHARE = 1 / 8
"""Of the blocks, under the policy "sampled": each is drawn by itself, so an error that stays is soon met."""
VERIFICATIONS_MAX = 2
"""Threads that digest at one time; further calls wait for their turn."""


class VerifyMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._verified = Counter(
            "baton_kv_blocks_verified",
            "KV blocks that came in: those that match their digests, those that do not, those not looked at",
            ("result",),
            registry=registry,
        )
        self._seconds = Counter(
            "baton_kv_verify_seconds", "Time that threads spent digesting KV blocks that came in", registry=registry
        )
        self._resent = Counter("baton_kv_blocks_resent", "KV blocks asked for again", registry=registry)

    def verified(self, matching: int, mismatching: int, skipped: int, seconds: float) -> None:
        for result, blocks in (("match", matching), ("mismatch", mismatching), ("skipped", skipped)):
            self._verified.labels(result).inc(blocks)
        self._seconds.inc(seconds)

    def resent(self, blocks: int) -> None:
        self._resent.inc(blocks)


class Verifier:
    """One worker's, on its loop; shared by all that it takes in."""

    def __init__(
        self, region: Region, policy: Policy, metrics: VerifyMetrics, random: Random, clock: Clock = monotonic
    ) -> None:
        """`random` draws the blocks to look at where not all are."""
        self._region, self._policy, self.metrics = region, policy, metrics
        self._random, self._clock = random, clock
        self._turns = asyncio.Semaphore(VERIFICATIONS_MAX)

    @property
    def wants_digests(self) -> bool:
        return self._policy != "never"

    async def mismatches(self, blocks: Sequence[BlockId], digests: Sequence[int]) -> list[int]:
        """Indices of the blocks that do not match, as they lie in the region; the digesting is done in a thread.

        The blocks are the caller's, and nobody writes into them, until this returns. Cancelled, a thread may still read
        them for a moment, which harms nobody.
        """
        assert len(blocks) == len(digests)
        chosen = self._choose(len(blocks))
        async with self._turns:
            began_s = self._clock()
            found = await self._digests([blocks[index] for index in chosen])
            seconds = self._clock() - began_s
        wrong = [index for index, digest in zip(chosen, found, strict=True) if digest != digests[index]]
        self.metrics.verified(len(chosen) - len(wrong), len(wrong), len(blocks) - len(chosen), seconds)
        return wrong

    def _choose(self, blocks: int) -> Sequence[int]:
        match self._policy:
            case "always":
                return range(blocks)
            case "sampled":
                return [index for index in range(blocks) if self._random.random() < SAMPLED_SHARE]
            case "never":
                return ()

    async def _digests(self, blocks: Sequence[BlockId]) -> Sequence[int]:
        return await asyncio.to_thread(self._region.digests, blocks) if blocks else ()
