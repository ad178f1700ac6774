"""A prefix cache that a KeepPolicy rules: what is kept and what goes, without any content. No clock of its own."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from baton.ids import BlockHash
from kvcache.eviction.interface import Candidates, KeepPolicy
from kvcache.tiers.index.row_set import RowSet

SAMPLE: Final = 128
"""Of the leaves, so many are drawn, as in the tiers."""
DROPPED_OF_SAMPLE: Final = 4
"""And so many of them dropped, at most, before others are drawn."""


class PrefixCache:
    """Holds at most `blocks_max` blocks after each request; each hangs on its predecessor, and goes before it.

    Every block saves as much as any other, and no other cache has a copy: what counts is hits.
    """

    def __init__(
        self, blocks_max: int, prompt_blocks_max: int, policy: KeepPolicy, random: np.random.Generator
    ) -> None:
        rows = blocks_max + prompt_blocks_max + 1
        self.blocks_max = blocks_max
        self._policy, self._random = policy, random
        self._row: dict[BlockHash, int] = {}
        self._name = [BlockHash(b"")] * rows
        self._free = list(range(rows - 1, 0, -1))
        self._parent = np.zeros(rows, np.int32)
        """0: it opens a prompt."""
        self._children = np.zeros(rows, np.int32)
        self._used_at = np.zeros(rows)
        self._uses, self._depth = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._leaves = RowSet(rows, rows)

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._row

    def request(self, names: Sequence[BlockHash], now_s: float) -> int:
        """Takes in a prompt's blocks; how many of its first ones were there."""
        hits = next((depth for depth, name in enumerate(names) if name not in self._row), len(names))
        parent = 0
        for depth, name in enumerate(names):
            row = self._row.get(name)
            parent = self._add(name, parent, depth) if row is None else row
        rows = [self._row[name] for name in names]
        self._used_at[rows] = now_s
        self._uses[rows] = self._policy.seen(names, np.arange(len(names), dtype=np.int32), now_s)
        while len(self._row) > self.blocks_max:
            self._drop_some(now_s)
        return hits

    def _add(self, name: BlockHash, parent: int, depth: int) -> int:
        row = self._free.pop()
        self._row[name], self._name[row] = row, name
        self._parent[row], self._depth[row] = parent, depth
        self._leaves.put(row, True)
        if parent:
            self._children[parent] += 1
            self._leaves.put(parent, False)
        return row

    def _drop_some(self, now_s: float) -> None:
        """The least valuable of some leaves, as many as there are too many."""
        rows = self._leaves.sample(SAMPLE, self._random)
        values = self._policy.values(self._candidates(rows, now_s))
        count = min(len(self._row) - self.blocks_max, DROPPED_OF_SAMPLE)
        for row in rows[np.argsort(values, kind="stable")[:count]].tolist():
            self._drop(row)

    def _candidates(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]], now_s: float) -> Candidates:
        return Candidates(
            age_s=now_s - self._used_at[rows],
            uses=self._uses[rows],
            depth=self._depth[rows],
            saved_s=np.ones(len(rows)),
            copies=np.zeros(len(rows), np.int32),
            size_bytes=1,
        )

    def _drop(self, row: int) -> None:
        parent = int(self._parent[row])
        self._leaves.put(row, False)
        del self._row[self._name[row]]
        self._free.append(row)
        if parent:
            self._children[parent] -= 1
            self._leaves.put(parent, not self._children[parent])

    def check_integrity(self) -> None:
        """Asserts that every block's predecessor is there, and that the leaves are those with no successor."""
        rows = set(self._row.values())
        parents = [int(self._parent[row]) for row in rows if self._parent[row]]
        assert rows.issuperset(parents), "a block without its predecessor"
        assert {row for row in rows if row in self._leaves} == rows.difference(parents)
        assert len(rows) + len(self._free) + 1 == len(self._name)
