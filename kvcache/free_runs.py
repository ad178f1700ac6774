"""Free block ids as runs of neighbours, so that a sequence can be given adjacent blocks and room to grow."""

from collections import OrderedDict
from collections.abc import Iterator

from baton.ids import BlockId


class FreeRuns:
    """A set of block ids kept as maximal runs `[start, end)`; every operation is O(1) in the number of blocks.

    Runs are filed by the power of two below their length: the topmost file holds the longest run, or
    one at least half as long.
    """

    def __init__(self, blocks: int, are_free: bool = True) -> None:
        """Blocks 0 to `blocks` - 1, all of which are in it, or none."""
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._by_size: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(blocks.bit_length() + 1)]
        self._count = 0
        if are_free:
            self._insert(0, blocks)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(sorted(self._end_of.items()))

    @property
    def longest(self) -> int:
        """The length of the run that `take` starts with: the longest, or at least half as long."""
        if not self._count:
            return 0
        start = self._longest()
        return self._end_of[start] - start

    def add(self, block: BlockId) -> None:
        """Joins the block with the runs on either side of it."""
        start, end = int(block), block + 1
        if block in self._start_of:
            start = self._start_of[block]
            self._remove(start)
        if end in self._end_of:
            following = end
            end = self._end_of[following]
            self._remove(following)
        self._insert(start, end)

    def add_run(self, start: int, end: int) -> None:
        """Adds the blocks `[start, end)`, of which neither neighbour is in it."""
        assert start not in self._start_of and end not in self._end_of
        self._insert(start, end)

    def take(self, count: int, after: BlockId | None) -> list[BlockId]:
        """Takes `count` blocks, which must be there: the ones right behind `after` if they are free, then
        the middle of the longest run, then whatever runs there are, long ones first."""
        assert 0 <= count <= self._count
        taken: list[BlockId] = []
        if after is not None and after + 1 in self._end_of:
            start = after + 1
            taken += self._cut(start, start, min(count, self._end_of[start] - start))
        while len(taken) < count:
            wanted = count - len(taken)
            start = self._longest()
            length = self._end_of[start] - start
            taken += self._cut(start, start + max(0, length - wanted) // 2, min(wanted, length))
        return taken

    def _longest(self) -> int:
        return next(next(iter(runs)) for runs in reversed(self._by_size) if runs)

    def _cut(self, start: int, first: int, count: int) -> list[BlockId]:
        """Takes `[first, first + count)` out of the run at `start`."""
        end = self._remove(start)
        self._insert(start, first)
        self._insert(first + count, end)
        return [BlockId(block) for block in range(first, first + count)]

    def _insert(self, start: int, end: int) -> None:
        if start < end:
            self._end_of[start], self._start_of[end] = end, start
            self._by_size[(end - start).bit_length()][start] = None
            self._count += end - start

    def _remove(self, start: int) -> int:
        end = self._end_of.pop(start)
        del self._start_of[end], self._by_size[(end - start).bit_length()][start]
        self._count -= end - start
        return end
