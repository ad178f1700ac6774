"""Blocks of the pool that are filled for no request: from lower tiers for a peer to read, or from a peer."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from baton.ids import BlockHash, BlockId, TenantTag
from baton.latency import Tier
from engine.interface import Reserved
from engine.prefix_cache import PrefixCache
from engine.restoring import Restoring
from kvcache.block_pool import BlockPool
from kvcache.tiers.interface import Owner, RestoreTiming

RESERVED_DIVISOR = 4
"""So much of the pool, one block in this many, may be in the course of being filled at a time."""
Note = Callable[[Sequence[BlockId], Sequence[int]], None]
"""Hears the digests of blocks that have just become prefix cache."""


@dataclass(frozen=True, slots=True)
class _Promotion:
    names: Sequence[BlockHash]
    """That are on their way up..."""
    blocks: Sequence[BlockId]
    """...into these."""
    shared: Sequence[BlockId]
    """Of the same run, in HBM already."""
    restoring: Restoring
    on_done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """Of a prompt: its blocks from `first` on are to be fetched."""

    root: BlockHash
    names: Sequence[BlockHash]
    first: int


class FilledBlocks:
    def __init__(self, pool: BlockPool, cache: PrefixCache, note: Note, watermark: int) -> None:
        """`watermark`: blocks that stay available for requests."""
        self._pool, self._cache, self._note, self._watermark = pool, cache, note, watermark
        self._promotions: list[_Promotion] = []
        self._reserved: dict[tuple[BlockId, ...], _Prefix | None] = {}
        """None: the cache was cleared meanwhile."""
        self._held: Counter[BlockId] = Counter()

    # ---- from lower tiers

    def promote(self, names: Sequence[BlockHash], on_done: Callable[[], None]) -> bool:
        places = self._cache.places(names)
        below = [index for index, place in enumerate(places) if place != "hbm"]
        shared = self._shared(names, places)
        room = self._room(shared)
        if not below or room <= 0:
            return False
        if len(below) > room:
            places = places[: below[room]]
            below, shared = below[:room], self._shared(names, places)
        self._hold(shared)
        blocks = self._allocate(len(below))
        wanted = [names[index] for index in below]
        restoring = self._cache.begin(wanted, blocks, tuple(below), places)
        self._promotions.append(_Promotion(wanted, blocks, shared, restoring, on_done))
        return True

    def _shared(self, names: Sequence[BlockHash], places: Sequence[Tier]) -> list[BlockId]:
        found = (self._pool.find(name) for name, place in zip(names, places, strict=False) if place == "hbm")
        return [block for block in found if block is not None]

    def _room(self, shared: Sequence[BlockId]) -> int:
        """Blocks that may be filled now, beside holding these."""
        filling = sum(len(p.blocks) for p in self._promotions) + sum(map(len, self._reserved))
        idle = self._pool.idle(shared)
        return min(self._pool.total // RESERVED_DIVISOR - filling, self._pool.available - idle - self._watermark)

    def settle(self) -> Iterator[RestoreTiming]:
        """Sees to what has come up by now, and gives up what does not come; yields what it took."""
        self._cache.give_up_slow(promotion.restoring for promotion in self._promotions)
        over = [promotion for promotion in self._promotions if promotion.restoring.is_over]
        self._promotions = [promotion for promotion in self._promotions if not promotion.restoring.is_over]
        for promotion in over:
            restored = promotion.restoring.restore.result
            assert restored is not None
            self._cache.seen_to(promotion.restoring)
            if not promotion.restoring.is_void:
                self._fill(promotion.names[: restored.good], promotion.blocks, restored.digests, tenant=None)
            self._let_go([*promotion.blocks, *promotion.shared])
            promotion.on_done()
            yield from restored.timings

    def clear(self, tenant: TenantTag | None) -> None:
        """What is on its way, of a tenant or all, does not become prefix cache. Before the lower tiers are cleared."""
        for promotion in self._promotions:
            if not promotion.restoring.is_void and self._cache.is_partly(tenant, promotion.names):
                self._cache.void(promotion.restoring)
        self._reserved = dict.fromkeys(self._reserved)  # whose these are is known when they are adopted

    @property
    def restoring(self) -> list[Restoring]:
        return [promotion.restoring for promotion in self._promotions]

    # ---- from a peer

    def reserve(self, root: BlockHash, names: Sequence[BlockHash]) -> Reserved:
        """For what is in no tier of the blocks that a prompt may reuse, `names`."""
        places = self._cache.places(names)
        shared = self._shared(names, places)
        first, count = len(places), len(names) - len(places)
        count = min(count, self._pool.total // RESERVED_DIVISOR)
        if count > self._room(shared):
            count = 0
        self._hold(shared)
        blocks = tuple(self._allocate(count))
        if blocks:
            self._reserved[blocks] = _Prefix(root, names[: first + count], first)
        return Reserved(tuple(shared), tuple(names[first : first + count]), blocks)

    def adopt(self, reserved: Reserved, digests: Sequence[int], owner: Owner) -> None:
        good = len(digests)
        assert good <= len(reserved.blocks)
        prefix = self._reserved.pop(reserved.blocks, None)
        if prefix is not None and good:
            self._cache.tell_published(prefix.root, prefix.names[: prefix.first + good], prefix.first, owner)
            known = digests if all(digests) else ()
            self._fill(reserved.names[:good], reserved.blocks, known, owner.tenant)
        self._let_go([*reserved.blocks, *reserved.held])

    # ---- both

    def _fill(
        self,
        names: Sequence[BlockHash],
        blocks: Sequence[BlockId],
        digests: Sequence[int],
        tenant: TenantTag | None,
    ) -> None:
        """As many blocks as there are names are what they should be; digests of these, or none."""
        good = blocks[: len(names)]
        for name, block in zip(names, good, strict=True):
            self._cache.publish_block(block, name, tenant)
        if digests:
            self._note(good, digests)

    def _allocate(self, count: int) -> list[BlockId]:
        blocks = self._pool.allocate(count)
        self._held.update(blocks)
        return blocks

    def _hold(self, blocks: Sequence[BlockId]) -> None:
        self._pool.hold(blocks)
        self._held.update(blocks)

    def _let_go(self, blocks: Sequence[BlockId]) -> None:
        self._held -= Counter(blocks)
        self._pool.release(blocks)

    def holds(self) -> Counter[BlockId]:
        """How often each block is kept."""
        return self._held

    def close(self) -> None:
        """Gives up what is on its way; whoever waits for it is told."""
        for promotion in self._promotions:
            promotion.restoring.restore.cancel()
        for _ in self.settle():
            pass
