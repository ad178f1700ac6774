"""Numbers the blocks that are known, by name: about 26 bytes a block where a dictionary of names takes 170.

Open addressing with linear probing: the table holds row numbers only, and a row's name lies beside it, in two columns
of 64-bit words. Rows count from 1, so that memory that nobody has touched yet, all zeros, is an empty table: a table
made for ten million blocks costs what it holds (the system gives the pages out as they are written).
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash
from kvcache.block_hash import HASH_BYTES

NO_ROW: Final = 0
PLACES_PER_ROW: Final = 1.25
"""Of the table, where every row is taken. Half of the rows or more are spare ones, as a rule."""
VECTOR_ROUNDS: Final = 2
"""Probes that are made for many names at once; the few names that need more get them one by one."""
Rows = NDArray[np.int64]
_MIX: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_WORDS: Final = Struct("<QQ")


class NameTable:
    """Up to `rows_max` names, each with a row from 1 to `rows_max` until it is removed.

    The lowest row that was never used is given only when no removed one is there to be given again.
    """

    def __init__(self, rows_max: int) -> None:
        assert 0 < rows_max < 2**31
        self.rows_max = rows_max
        self._places = int(rows_max * PLACES_PER_ROW) + 1
        self.low = np.zeros(rows_max + 1, np.uint64)
        self.high = np.zeros(rows_max + 1, np.uint64)
        self._table = np.zeros(self._places, np.int32)
        self._low, self._high, self._row_at = self.low.data, self.high.data, self._table.data
        """The same memory: one number of it is read in a third of the time that numpy takes."""
        self._next_free = NO_ROW
        """Removed rows, each with the next one in `low`."""
        self.rows_used = 0
        """No row above this one was ever given."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, name: BlockHash) -> int:
        """The name's row, or NO_ROW."""
        low, high = _WORDS.unpack(name)
        return self._probe(low, high)[1]

    def find_all(self, names: Sequence[BlockHash]) -> Rows:
        """The rows of many names, NO_ROW for those that are not there."""
        words = np.frombuffer(b"".join(names), "<u8").reshape(-1, 2)
        low, high = words[:, 0], words[:, 1]
        places = self._homes(low, high)
        found: Rows = self._table[places].astype(np.int64)
        wrong = self._mismatches(found, low, high)
        for _ in range(VECTOR_ROUNDS - 1):
            places[wrong] = (places[wrong] + 1) % self._places
            found[wrong] = self._table[places[wrong]]
            wrong = wrong[self._mismatches(found[wrong], low[wrong], high[wrong])]
        for index in wrong.tolist():
            found[index] = self._probe(int(low[index]), int(high[index]))[1]
        return found

    def enter(self, name: BlockHash) -> int:
        """The name's row, a new one if it had none. NO_ROW: every row is taken."""
        low, high = _WORDS.unpack(name)
        place, found = self._probe(low, high)
        if found != NO_ROW or self._count == self.rows_max:
            return found
        row = self._take_row()
        self._low[row], self._high[row], self._row_at[place] = low, high, row
        self._count += 1
        return row

    def remove(self, row: int) -> None:
        """The name is gone and the row may be given again."""
        low, high = self._low[row], self._high[row]
        place, found = self._probe(low, high)
        assert found == row
        self._close_gap(place)
        self._low[row], self._high[row], self._next_free = self._next_free, 0, row
        self._count -= 1

    def keep(self, are_kept: NDArray[np.bool_]) -> None:
        """Removes all rows but these, of the first `rows_used` + 1, row 0 not being one. O(rows), without a step of
        Python for each."""
        rows, others = np.flatnonzero(are_kept), np.flatnonzero(~are_kept)[1:]
        homes = self._homes(self.low[rows], self.high[rows])
        order = np.argsort(homes, kind="stable")
        rows, homes, steps = rows[order], homes[order], np.arange(len(rows))
        places = steps + np.maximum.accumulate(homes - steps)  # each behind the one before, or at its home
        fits = places < self._places
        self._table[:] = NO_ROW
        self._table[places[fits]] = rows[fits]
        for row in rows[~fits].tolist():  # past the end: from the beginning
            low, high = self._low[row], self._high[row]
            self._row_at[self._probe(low, high)[0]] = row
        self.low[others], self.high[others] = np.append(others[1:], NO_ROW)[: len(others)], 0
        self._next_free = int(others[0]) if len(others) else NO_ROW
        self._count = len(rows)

    def name(self, row: int) -> BlockHash:
        return BlockHash(_WORDS.pack(self._low[row], self._high[row]))

    def names(self, rows: Rows) -> list[BlockHash]:
        return names_of(self.words(rows))

    def words(self, rows: Rows) -> NDArray[np.uint64]:
        """The names of many rows, to be read by `names_of`, also when they are gone."""
        return np.stack((self.low[rows], self.high[rows]), axis=1)

    @property
    def size_bytes(self) -> int:
        """Resident: the table's pages are written all over, the columns' up to the highest row."""
        return self._table.nbytes + (self.low.itemsize + self.high.itemsize) * (self.rows_used + 1)

    # ---- inside

    def _homes(self, low: NDArray[np.uint64], high: NDArray[np.uint64]) -> Rows:
        mixed = ((low ^ high) * np.uint64(_MIX)) >> np.uint64(32)
        return (mixed * np.uint64(self._places) >> np.uint64(32)).astype(np.int64)

    def _home(self, low: int, high: int) -> int:
        mixed = ((low ^ high) * _MIX & _MASK) >> 32
        return mixed * self._places >> 32

    def _probe(self, low: int, high: int) -> tuple[int, int]:
        """Where the name is and its row, or the first empty place and NO_ROW."""
        row_at, lows, highs = self._row_at, self._low, self._high
        place = ((low ^ high) * _MIX & _MASK) >> 32  # its home; a call of `_home` would take as long as all the rest
        place = place * self._places >> 32
        while (row := row_at[place]) and (lows[row] != low or highs[row] != high):
            place += 1
            if place == self._places:
                place = 0
        return place, row

    def _mismatches(self, rows: Rows, low: NDArray[np.uint64], high: NDArray[np.uint64]) -> Rows:
        """Which of the rows exist but go by another name."""
        return np.flatnonzero(((self.low[rows] != low) | (self.high[rows] != high)) & (rows != NO_ROW))

    def _take_row(self) -> int:
        row = self._next_free
        if row != NO_ROW:
            self._next_free = self._low[row]
            return row
        self.rows_used += 1
        return self.rows_used

    def _close_gap(self, gap: int) -> None:
        """Moves what follows back to where its probes can still find it, so that no tombstones are needed."""
        row_at, places = self._row_at, self._places
        place = gap
        while True:
            place = (place + 1) % places
            row = row_at[place]
            if not row:
                break
            home = self._home(self._low[row], self._high[row])
            if (place - home) % places >= (place - gap) % places:
                row_at[gap], gap = row, place
        row_at[gap] = NO_ROW

    def check_integrity(self) -> None:
        """Asserts that every row in the table can be found, each once. O(places)."""
        rows = [row for row in self._row_at if row]
        assert len(rows) == len(set(rows)) == self._count
        for row in rows:
            assert self.find(self.name(row)) == row


def names_of(words: NDArray[np.uint64]) -> list[BlockHash]:
    data = words.astype("<u8").tobytes()
    return [BlockHash(data[start : start + HASH_BYTES]) for start in range(0, len(data), HASH_BYTES)]
