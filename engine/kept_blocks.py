"""Blocks that are kept out of the pool for nobody whom this engine computes for."""

from collections import Counter
from collections.abc import Iterable, Sequence

from baton.ids import BlockHash, BlockId, RequestId
from kvcache.block_pool import BlockPool


class KeptBlocks:
    """Those of abandoned requests, until nobody writes into them any more, and cached ones that somebody reads."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._abandoned: dict[RequestId, list[BlockId]] = {}
        self._read: Counter[BlockId] = Counter()

    def abandon(self, request_id: RequestId, blocks: Iterable[BlockId]) -> None:
        """Takes over one hold on each of these; the same request may come several times."""
        self._abandoned.setdefault(request_id, []).extend(blocks)

    def reclaim(self, request_id: RequestId) -> None:
        """Gives back what `abandon` took over; unknown ids are ignored."""
        self._pool.release(self._abandoned.pop(request_id, []))

    def hold(self, names: Iterable[BlockHash]) -> tuple[BlockId, ...]:
        """The longest cached prefix of `names`, held until `let_go`."""
        blocks = self._pool.match(names).blocks
        self._pool.hold(blocks)
        self._read.update(blocks)
        return blocks

    def let_go(self, blocks: Sequence[BlockId]) -> None:
        """Of one `hold`, once."""
        assert all(self._read[block] for block in blocks), "let go of blocks that nobody holds"
        self._read -= Counter(blocks)
        self._pool.release(blocks)

    def holds(self) -> Counter[BlockId]:
        """How often each block is kept. O(blocks)."""
        return self._read + Counter(block for blocks in self._abandoned.values() for block in blocks)
