"""Who holds which KV block, and which blocks hold a prefix that can be used again.

A block is *held* (by one or more sequences), *cached* (by nobody, but published under the name of its
content) or *free*. When free ones run out, cached ones are given away by second chance: a hand sweeps over
the pool and evicts what was not used again since it last came by. What was only ever used by the one who computed
it gets no second chance, so that a scan does not push out what comes again and again (on conversations 2 to 10 % more
hits than if it did). Unlike the strictly oldest, what the hand evicts lies together, so that sequences get adjacent
blocks from a full pool too (a simulation of 32 sequences of 25 blocks in a pool of 4096: 4 runs a sequence, against
24).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from baton.ids import BlockHash, BlockId
from kvcache.free_runs import FreeRuns

SPARE_DIVISOR = 32
"""Once the pool is full, one block in so many is kept free, so that growing sequences find neighbours."""
RUN_DIVISOR = 8
"""Cached blocks are evicted for the sake of a longer run until one in so many is free, and no further."""

UPCOMING_SWEEP = 8
"""Blocks that are looked at for each that is asked for of those that will be evicted next."""


class PoolListener(Protocol):
    """Hears what the prefix cache gains and loses. Must not call the pool."""

    def stored(self, block: BlockId, name: BlockHash) -> None: ...

    def removed(self, block: BlockId, name: BlockHash) -> None:
        """The block's content is still there until `flush` returns."""

    def flush(self) -> None:
        """Blocks that were removed are about to be given away."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached prefix. Nobody is promised these blocks until they are held."""

    blocks: tuple[BlockId, ...]
    idle: int
    """How many of them nobody holds: holding these makes that many fewer available."""


class BlockPool:
    """Every block belongs to the pool; whoever allocates or holds one releases it exactly once.

    Not thread-safe: the engine's thread owns it.
    """

    def __init__(self, blocks: int, *listeners: PoolListener) -> None:
        assert blocks > 0
        self.total = blocks
        self._listeners = listeners
        self._free = FreeRuns(blocks)
        self._holders = [0] * blocks
        self._name: list[BlockHash | None] = [None] * blocks
        self._by_name: dict[BlockHash, BlockId] = {}
        self._cached: set[BlockId] = set()
        self._is_recent = [False] * blocks
        """Of cached blocks: used again since the hand last came by."""
        self._is_new = [False] * blocks
        """Of published blocks: used by nobody yet, or by the one who still holds it."""
        self._hand = blocks
        """Sweeps downwards, because within a sequence the tail must go before the head, without which it
        cannot be found."""

    # ---- counts

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    @property
    def available(self) -> int:
        """What can be allocated: free and cached blocks."""
        return self.free + self.cached

    # ---- holding

    def find(self, name: BlockHash) -> BlockId | None:
        """The block that is published under this name. Nobody is promised it until it is held."""
        return self._by_name.get(name)

    def match(self, names: Iterable[BlockHash]) -> PrefixMatch:
        """The blocks of the longest prefix of `names` that is published."""
        blocks = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return PrefixMatch(tuple(blocks), self.idle(blocks))

    def idle(self, blocks: Iterable[BlockId]) -> int:
        """How many of these published blocks nobody holds."""
        return sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Sequence[BlockId]) -> None:
        """One more holder for each of these blocks, which are held or cached."""
        for block in blocks:
            if not self._holders[block]:
                self._cached.remove(block)
            self._holders[block] += 1

    def allocate(self, count: int, after: BlockId | None = None) -> list[BlockId]:
        """`count` blocks of unknown content, at most `available` of them, held once by the caller.

        Adjacent ascending ids as far as possible, starting right behind `after`: attention reads runs of
        neighbours in place.
        """
        assert count <= self.available
        cached = self.cached
        self._make_room(count)
        if self.cached < cached:
            for listener in self._listeners:
                listener.flush()
        blocks = self._free.take(count, after)
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[BlockId], *, is_used: bool = True) -> None:
        """One holder fewer for each of these blocks. `is_used`: somebody had a use for what is in them."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} released too often"
            self._holders[block] -= 1
            if is_used:
                self._is_recent[block], self._is_new[block] = not self._is_new[block], False
            if self._holders[block]:
                continue
            if self._name[block] is None:
                self._free.add(block)
            else:
                self._cached.add(block)

    # ---- the prefix cache

    def publish(self, block: BlockId, name: BlockHash) -> None:
        """A held block's content is final and goes by this name. If another block has the same content,
        that one stays the one that is found."""
        assert self._holders[block] > 0
        if name in self._by_name:
            return
        assert self._name[block] is None, f"block {block} published under two names"
        self._name[block], self._by_name[name] = name, block
        self._is_recent[block], self._is_new[block] = False, True
        for listener in self._listeners:
            listener.stored(block, name)

    def forget(self, blocks: Iterable[BlockId]) -> None:
        """These published blocks are no prefix cache any more: free, at once or when nobody holds them. What hears of
        it is not told to flush: nothing of them is to be kept."""
        for block in blocks:
            if block in self._cached:
                self._evict(block)
            else:
                self._unpublish(block)

    def _make_room(self, count: int) -> None:
        """Evicts until `count` blocks are free, and a spare; and some more while that may give them in one run."""
        least = max(count, self.total // SPARE_DIVISOR)
        for_one_run = self.total // RUN_DIVISOR
        while self._cached and (self.free < least or (self._free.longest < count and self.free < for_one_run)):
            self._evict(self._next_unused())

    def _next_unused(self) -> BlockId:
        """Moves the hand to a cached block; twice around the pool at most."""
        while True:
            self._hand = (self._hand or self.total) - 1
            block = BlockId(self._hand)
            if block not in self._cached:
                continue
            if not self._is_recent[block]:
                return block
            self._is_recent[block] = False

    def _evict(self, block: BlockId) -> None:
        self._cached.remove(block)
        self._unpublish(block)
        self._free.add(block)

    def _unpublish(self, block: BlockId) -> None:
        name = self._name[block]
        assert name is not None
        self._name[block] = None
        del self._by_name[name]
        for listener in self._listeners:
            listener.removed(block, name)

    def upcoming(self, count: int) -> list[tuple[BlockId, BlockHash]]:
        """Cached blocks in about the order in which they will be evicted, at most so many: the hand's next lap is
        looked at, or a part of it, so it takes O(count). Changes nothing."""
        unused: list[tuple[BlockId, BlockHash]] = []
        recent: list[tuple[BlockId, BlockHash]] = []
        for step in range(1, min(self.total, UPCOMING_SWEEP * count) + 1):
            block = BlockId((self._hand - step) % self.total)
            name = self._name[block]
            if name is None or block not in self._cached:
                continue
            (recent if self._is_recent[block] else unused).append((block, name))
            if len(unused) == count:
                break
        return (unused + recent)[:count]

    # ---- self-check

    def holders(self) -> dict[BlockId, int]:
        """How many hold each block that is held. O(blocks)."""
        return {BlockId(block): holders for block, holders in enumerate(self._holders) if holders}

    def published(self) -> set[BlockId]:
        """The blocks of the prefix cache, held or not. O(blocks)."""
        return set(self._by_name.values())

    def check_integrity(self) -> None:
        """Asserts that every block is in exactly one state and that all indexes agree. O(blocks)."""
        runs = list(self._free)
        assert all(end < start for (_, end), (start, _) in pairwise(runs)), "runs touch or overlap"
        free = {block for start, end in runs for block in range(start, end)}
        assert len(free) == self.free
        for block, holders in enumerate(self._holders):
            states = (block in free, block in self._cached, holders > 0)
            assert states.count(True) == 1, f"block {block}: (free, cached, held) is {states}"
            assert not (block in free and self._name[block]), f"block {block} is free but published"
        named = {BlockId(block): name for block, name in enumerate(self._name) if name is not None}
        assert named == {block: name for name, block in self._by_name.items()}
        assert self._cached <= named.keys()
