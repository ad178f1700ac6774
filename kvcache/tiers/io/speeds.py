"""How fast the tiers of this worker have been: what a restore goes by before it knows its own speed."""

from collections.abc import Iterable

from kvcache.tiers.interface import LowerTier, RestoreTiming

UNKNOWN_BYTES_PER_S: dict[LowerTier, float] = {"ddr": 4e9, "ssd": 1e9}
"""Until the first restore has told."""
DIGEST_BYTES_PER_S = 1e10
SMALLEST_BYTES = 2**20
"""A restore of less says more of waiting than of speed."""
NEWEST_SHARE = 0.25


class TierSpeeds:
    """An exponential average over restores. Any thread."""

    def __init__(self) -> None:
        self._bytes_per_s: dict[LowerTier, float] = {}

    def bytes_per_s(self, tier: LowerTier) -> float:
        return self._bytes_per_s.get(tier, UNKNOWN_BYTES_PER_S[tier])

    def digest_s(self, size_bytes: int) -> float:
        """How long verifying so much takes."""
        return size_bytes / DIGEST_BYTES_PER_S

    def learn(self, timings: Iterable[RestoreTiming]) -> None:
        for timing in timings:
            if timing.size_bytes >= SMALLEST_BYTES and timing.seconds > 0:
                newest = timing.size_bytes / timing.seconds
                before = self._bytes_per_s.get(timing.tier, newest)
                self._bytes_per_s[timing.tier] = before + NEWEST_SHARE * (newest - before)
