"""How likely blocks are used again, by kind and age, as observed.

A kind is a range of reuses so far and, until the second, a range of depths in the prompt; ages fall into bins of half
an octave. For each: how many blocks got as far without a use, and how many of them were used within it (the
product-limit estimator: Kaplan and Meier, 1958). A block that was forgotten, or just has not been used yet, counts as
far as it was watched: nothing need be dropped for its fate to be known. What was observed counts less and less as more
is.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvcache.eviction.history import DEPTH_MAX, USES_MAX, Entries
from kvcache.eviction.interface import Counts, Floats

AGE_MIN_S: Final = 2.0**-4
"""The first bin ends here; anything younger is in it."""
BINS_PER_OCTAVE: Final = 2
AGE_BINS: Final = 48
"""The last one begins at some 5 days."""
_EDGES_S: Floats = np.concatenate([[0.0], AGE_MIN_S * 2.0 ** (np.arange(AGE_BINS) / BINS_PER_OCTAVE)])
BIN_WIDTHS_S: Floats = np.diff(_EDGES_S)

USE_KINDS: Final = 10
"""0, 1, 2, 3, 4-7, 8-15, ... reuses."""
DEPTH_KINDS: Final = 3
"""Depths 0-2, 3-14, 15 and on; finer ones would rest on a few long prompts each, whose blocks all fare alike."""
USES_BY_DEPTH: Final = 1
"""With more reuses than that the depth no longer tells anything."""
KINDS: Final = USE_KINDS * DEPTH_KINDS

EVIDENCE: Final = 100.0
"""What is expected of a kind before anything is known of it weighs as much as so many blocks: a few prompts'."""
_SMOOTHING: Floats = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
"""Across neighbouring ages."""


def _kinds_of_uses() -> NDArray[np.intp]:
    uses = np.arange(USES_MAX + 1)
    return np.where(uses < 4, uses, np.minimum(np.log2(np.maximum(uses, 1)).astype(np.intp) + 2, USE_KINDS - 1))


def _kinds_of_depths() -> NDArray[np.intp]:
    depths = np.arange(DEPTH_MAX + 1)
    return np.minimum(np.log2(depths + 1).astype(np.intp) // 2, DEPTH_KINDS - 1)


_KIND_OF_USES: Final = _kinds_of_uses()
_KIND_OF_DEPTH: Final = _kinds_of_depths()


def kinds(uses: Counts, depth: Counts) -> NDArray[np.intp]:
    by_depth = np.where(uses <= USES_BY_DEPTH, _KIND_OF_DEPTH[np.minimum(depth, DEPTH_MAX)], 0)
    return np.asarray(_KIND_OF_USES[np.minimum(uses, USES_MAX)] * DEPTH_KINDS + by_depth, np.intp)


def age_positions(age_s: Floats) -> Floats:
    """Where ages lie among the bins: 2.5 is (by the logarithm) half way through bin 2."""
    position = np.log2(np.maximum(age_s, AGE_MIN_S / 2) / AGE_MIN_S) * BINS_PER_OCTAVE + 1.0
    return np.asarray(np.clip(position, 0.0, AGE_BINS - 1e-6), np.float64)


def expected_chances() -> Floats:
    """Before anything was observed: [use kind][bin].

    Laplace's rule of succession: what was reused n times is with a chance of (n + 1) / (n + 2) reused once more; in
    any octave of age alike. So the longer unused the less likely: LRU, but what was used again is kept longer.
    """
    fewest_uses = np.searchsorted(_KIND_OF_USES, np.arange(USE_KINDS))
    chances = 1.0 - (1.0 / (fewest_uses + 2.0)) ** (1.0 / AGE_BINS)
    return np.repeat(chances[:, None], AGE_BINS, axis=1)


class ReuseRates:
    """What was observed, by kind and bin of age."""

    def __init__(self) -> None:
        self._used = np.zeros((KINDS, AGE_BINS))
        self._forgotten = np.zeros((KINDS, AGE_BINS))

    def used(self, blocks: Entries) -> None:
        self._used += _count(blocks)

    def forgotten(self, blocks: Entries) -> None:
        self._forgotten += _count(blocks)

    def fade(self, weight: float) -> None:
        """What was observed so far weighs so much less."""
        self._used *= weight
        self._forgotten *= weight

    def chances(self, waiting: Entries, weight: float, memory_s: float) -> Floats:
        """[kind][bin]: how likely a block that is unused when it enters the bin is used within it.

        `waiting`: a sample of the blocks that have not been used again yet, each standing for `weight` of them.
        Something that happened t seconds ago has been weighed exp(-t / memory_s).
        """
        unused = self._forgotten + weight * _count(waiting)
        reached = (self._used + unused) @ _still_counts(memory_s) - unused / 2
        by_uses = (USE_KINDS, DEPTH_KINDS, AGE_BINS)
        expected = _estimate(
            self._used.reshape(by_uses).sum(axis=1), reached.reshape(by_uses).sum(axis=1), expected_chances()
        )
        return _estimate(self._used, reached, np.repeat(expected, DEPTH_KINDS, axis=0))


def _count(blocks: Entries) -> Floats:
    bins = age_positions(blocks.age_s).astype(np.intp)
    places = kinds(blocks.uses, blocks.depth) * AGE_BINS + bins
    return np.bincount(places, minlength=KINDS * AGE_BINS).reshape(KINDS, AGE_BINS).astype(np.float64)


def _still_counts(memory_s: float) -> Floats:
    """[bin a][bin b]: how much the passage through b of a block that is now in a still counts; 0 if it is to come."""
    passed_s = np.subtract.outer(_EDGES_S[:-1], _EDGES_S[:-1])
    return np.asarray(np.tril(np.exp(-np.maximum(passed_s, 0.0) / memory_s)), np.float64)


def _estimate(used: Floats, reached: Floats, expected: Floats) -> Floats:
    chances = (_smooth(used) + EVIDENCE * expected) / (_smooth(reached) + EVIDENCE)
    return np.asarray(np.minimum(chances, 1.0 - 1e-3), np.float64)


def _smooth(counts: Floats) -> Floats:
    margin = len(_SMOOTHING) // 2
    padded = np.pad(counts, ((0, 0), (margin, margin)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(_SMOOTHING), axis=1)
    return np.asarray(windows @ _SMOOTHING, np.float64)


def memory_s(elapsed_s: float, weight: float) -> float:
    """The time constant of fading to `weight` in so many seconds."""
    return max(elapsed_s, AGE_MIN_S) / -math.log(weight)
