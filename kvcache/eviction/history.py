"""When blocks were last used and how often, by name, whether any tier still has them: a bounded memory.

A set-associative table: a name's own bytes choose its set; in a full set the name that was used longest ago is
forgotten. 16 bytes a name, all of it set aside when built, and resident as far as it was touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash
from kvcache.eviction.interface import Counts, Floats

WAYS: Final = 8
Indexes = NDArray[np.intp]
USES_MAX: Final = 2**15 - 1
DEPTH_MAX: Final = 2**15 - 1


@dataclass(frozen=True, slots=True)
class Entries:
    """Names of the table, each an entry of every array."""

    age_s: Floats
    uses: Counts
    depth: Counts


def joined(parts: Sequence[Entries]) -> Entries:
    if not parts:
        return Entries(np.empty(0), np.empty(0, np.int32), np.empty(0, np.int32))
    return Entries(*(np.concatenate([getattr(part, field) for part in parts]) for field in Entries.__slots__))


@dataclass(frozen=True, slots=True)
class Seen:
    """What one call came upon."""

    uses: Counts
    """Of each name, before: 0 if it is new or was forgotten."""
    again: Entries
    """Those that were known, as they were: used again at that age."""
    forgotten: Entries
    """Those that had to make room, as they were."""


class UseHistory:
    """At most `names_max` names, rounded up to a power of two."""

    def __init__(self, names_max: int) -> None:
        self.sets = 1 << max(0, (names_max - 1) // WAYS).bit_length()
        shape = (self.sets, WAYS)
        self._tag = np.zeros(shape, np.uint32)
        """The part of a name that did not choose the set; 0: nothing here."""
        self._used_at = np.full(shape, -np.inf, np.float64)
        self._uses = np.zeros(shape, np.int16)
        self._depth = np.zeros(shape, np.int16)

    @property
    def names_max(self) -> int:
        return self.sets * WAYS

    def see(self, names: Sequence[BlockHash], depths: Counts, now_s: float) -> Seen:
        """These, all different, are used now."""
        rows, tags = self._places_of(names)
        is_mine = self._tag[rows] == tags[:, None]
        is_known, ways = is_mine.any(axis=1), is_mine.argmax(axis=1)
        known = rows[is_known], ways[is_known]
        again = self._entries(known, now_s)
        uses = np.zeros(len(names), np.int32)
        uses[is_known] = np.minimum(again.uses + 1, USES_MAX)
        self._used_at[known], self._uses[known] = now_s, uses[is_known]
        depths = np.minimum(depths[~is_known], DEPTH_MAX)
        forgotten = self._add(rows[~is_known], tags[~is_known], depths, now_s)
        return Seen(uses, again, forgotten)

    def sample(self, first_set: int, sets: int, now_s: float) -> Entries:
        """All names of so many sets. Names fall into sets by chance, so this is a fair sample."""
        window = slice(first_set, first_set + sets)
        rows, ways = np.nonzero(self._tag[window])
        return self._entries((rows + first_set, ways), now_s)

    def _places_of(self, names: Sequence[BlockHash]) -> tuple[Indexes, NDArray[np.uint32]]:
        words = np.frombuffer(b"".join(names), np.uint64).reshape(len(names), -1)
        rows = (words[:, 0] & np.uint64(self.sets - 1)).astype(np.intp)
        return rows, np.maximum(words[:, 1].astype(np.uint32), np.uint32(1))

    def _add(self, rows: Indexes, tags: NDArray[np.uint32], depths: Counts, now_s: float) -> Entries:
        """New names, each into the way of its set that was not used longest. What was there, as it was."""
        gone = []
        while len(rows):
            _, once = np.unique(rows, return_index=True)
            at = rows[once], self._used_at[rows[once]].argmin(axis=1)
            was_taken = self._tag[at] != 0
            gone.append(self._entries((at[0][was_taken], at[1][was_taken]), now_s))
            self._tag[at], self._used_at[at], self._uses[at], self._depth[at] = tags[once], now_s, 0, depths[once]
            left = np.ones(len(rows), bool)
            left[once] = False
            rows, tags, depths = rows[left], tags[left], depths[left]
        return joined(gone)

    def _entries(self, at: tuple[Indexes, Indexes], now_s: float) -> Entries:
        return Entries(now_s - self._used_at[at], self._uses[at].astype(np.int32), self._depth[at].astype(np.int32))
