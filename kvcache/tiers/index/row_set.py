"""A set of rows of which a few can be drawn by chance, at a cost that does not grow with it."""

import numpy as np
from numpy.typing import NDArray

from kvcache.name_table import Rows


class RowSet:
    """At most `rows_max` rows, whose numbers are below `rows_end`: 4 bytes a row, and 4 for each that is in it."""

    def __init__(self, rows_max: int, rows_end: int) -> None:
        self._members = np.zeros(rows_max, np.int32)
        self._places = np.zeros(rows_end, np.int32)
        self._member_at, self._place_of = self._members.data, self._places.data
        """The same memory."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, row: int) -> bool:
        return bool(self._place_of[row])

    @property
    def places(self) -> "memoryview[int]":
        """By row: not 0 if it is in the set."""
        return self._place_of

    def put(self, row: int, is_member: bool) -> None:
        """Adds or removes it; nothing if that is how it is."""
        place = self._place_of[row]
        if is_member and not place:
            self._member_at[self._count] = row
            self._count += 1
            self._place_of[row] = self._count
        elif place and not is_member:
            self._count -= 1
            last = self._member_at[self._count]
            self._member_at[place - 1], self._place_of[last] = last, place
            self._place_of[row] = 0

    def fill(self, rows: Rows) -> None:
        """These, and no others."""
        self._places[self._members[: self._count]] = 0
        self._count = len(rows)
        self._members[: self._count] = rows
        self._places[rows] = np.arange(1, self._count + 1)

    def sample(self, count: int, random: np.random.Generator) -> Rows:
        """`count` different ones, evenly spread from a place drawn by chance; all if there are no more."""
        if self._count <= count:
            return self._members[: self._count].astype(np.int64)
        spread: NDArray[np.int64] = np.arange(count) * self._count // count
        chosen = (spread + random.integers(self._count)) % self._count
        sample: Rows = self._members[chosen].astype(np.int64)
        return sample
