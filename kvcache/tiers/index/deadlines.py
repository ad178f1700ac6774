"""What ends at a time of its own, found when that has come."""

import heapq
from collections.abc import Iterator
from math import inf


class Deadlines:
    """A time for each of some rows, perhaps never. O(log n); an entry of the heap for each row, however often its time
    is put off, and for a while one for a row that was discarded and entered again with an earlier time."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}
        self._entry: dict[int, float] = {}
        """The time of a row's entry in the heap that counts: its own, or an earlier one that it was put off from."""
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, row: int) -> bool:
        return row in self._until

    def __iter__(self) -> Iterator[int]:
        return iter(self._until)

    def until(self, row: int) -> float:
        """0: it has none."""
        return self._until.get(row, 0.0)

    def put_off(self, row: int, until: float) -> None:
        """To then, if that is later."""
        self._until[row] = max(until, self.until(row))
        if self._entry.get(row, inf) > self._until[row]:
            self._enter(row)

    def discard(self, row: int) -> None:
        self._until.pop(row, None)

    def pop_due(self, now: float) -> list[int]:
        """Those whose time has come; they have none any more."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            time, row = heapq.heappop(self._heap)
            if self._entry.get(row) != time:
                continue  # another entry of the row counts
            del self._entry[row]
            if row not in self._until:
                continue
            if self._until[row] > now:
                self._enter(row)
            else:
                del self._until[row]
                due.append(row)
        return due

    def _enter(self, row: int) -> None:
        if self._until[row] == inf:
            return
        self._entry[row] = self._until[row]
        heapq.heappush(self._heap, (self._until[row], row))
