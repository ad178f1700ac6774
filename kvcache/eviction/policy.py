"""Keeps the blocks that save the most time per byte and second of keeping them, as far as can be foreseen."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from baton.ids import BlockHash
from kvcache.eviction.gittins import gittins_index
from kvcache.eviction.history import WAYS, UseHistory
from kvcache.eviction.interface import Candidates, Counts, Floats, KeepPolicy
from kvcache.eviction.reuse_rates import (
    BIN_WIDTHS_S,
    DEPTH_KINDS,
    ReuseRates,
    age_positions,
    expected_chances,
    kinds,
    memory_s,
)

HISTORY_NAMES_MIN: Final = 2**16
HISTORY_NAMES_MAX: Final = 2**22
"""64 MiB."""
FIRST_REVIEW_USES: Final = 128
REVIEW_USES: Final = 2**12
"""The index is worked out anew each time so many blocks were used (a few ms); at first sooner."""
MEMORY_USES: Final = 2**19
"""An observation that is so many uses old weighs 1 / e."""
SAMPLE_NAMES: Final = 2**14


def make_policy(blocks: int) -> KeepPolicy:
    """For tiers of so many blocks in all, HBM's included."""
    return GittinsPolicy(min(max(2 * blocks, HISTORY_NAMES_MIN), HISTORY_NAMES_MAX))


class GittinsPolicy:
    """Worth of a block = Gittins' index of its kind and age, in uses per second, times the seconds that a use saves."""

    def __init__(self, history_names: int) -> None:
        self._history = UseHistory(history_names)
        self._rates = ReuseRates()
        self._index = _index_of(np.repeat(expected_chances(), DEPTH_KINDS, axis=0))
        self._uses_since = 0
        self._review_after = FIRST_REVIEW_USES
        self._reviewed_at = -np.inf
        self._next_set = 0

    def seen(self, names: Sequence[BlockHash], depths: Counts, now_s: float) -> Counts:
        if not names:
            return np.empty(0, np.int32)
        if self._uses_since >= self._review_after:
            self._review(now_s)
        self._uses_since += len(names)
        seen = self._history.see(names, depths, now_s)
        self._rates.used(seen.again)
        self._rates.forgotten(seen.forgotten)
        return seen.uses

    def values(self, blocks: Candidates) -> Floats:
        position = age_positions(blocks.age_s)
        bins = position.astype(np.intp)
        part = position - bins
        kind = kinds(blocks.uses, blocks.depth)
        uses_per_s = (1.0 - part) * self._index[kind, bins] + part * self._index[kind, bins + 1]
        return np.asarray(uses_per_s * worth_s(blocks) / blocks.size_bytes, np.float64)

    def _review(self, now_s: float) -> None:
        """Forms the index anew from all that was observed."""
        weight = max(1.0 - self._uses_since / MEMORY_USES, 0.5)
        fading_s = memory_s(now_s - self._reviewed_at, weight)
        self._rates.fade(weight)
        sets = min(self._history.sets, SAMPLE_NAMES // WAYS)
        waiting = self._history.sample(self._next_set, sets, now_s)
        self._index = _index_of(self._rates.chances(waiting, self._history.sets / sets, fading_s))
        self._next_set = (self._next_set + sets) % self._history.sets
        self._reviewed_at, self._uses_since = now_s, 0
        self._review_after = min(2 * self._review_after, REVIEW_USES)


def worth_s(blocks: Candidates) -> Floats:
    """Seconds that a use of each saves, of which this copy may take the credit.

    With n copies elsewhere, what computing takes longer than fetching is saved as long as one of the n + 1 is left: so
    each is worth the same share of it (its Shapley value). What fetching takes longer than restoring, only this saves.
    """
    own = np.minimum(blocks.fetch_s, np.maximum(blocks.saved_s, 0.0))
    return np.asarray(own + (blocks.saved_s - own) / (1 + blocks.copies), np.float64)


def _index_of(chances: Floats) -> Floats:
    """[kind][edge of bins]"""
    return np.pad(gittins_index(chances, BIN_WIDTHS_S), ((0, 0), (0, 1)), mode="edge")
