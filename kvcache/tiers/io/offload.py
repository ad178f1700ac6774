"""Copies blocks of the pool down into rows of host memory, compressed if so wished, with their digests."""

from collections.abc import Sequence

from baton.digest import digests_of
from baton.ids import BlockId
from baton.layout import KVLayout
from kvcache.tiers.interface import BlockCopier, Rows, Slot
from kvcache.tiers.io.restore_copies import first_slots, stored_digests
from kvcache.tiers.rows.codec import Codec
from kvcache.tiers.rows.copier import places, slices_of
from kvcache.tiers.rows.staging import Staging

BATCH_BYTES = 4 * 2**20
"""Copied and digested at a time: still in the processor's cache when it is digested, and enough that the calls of numpy
do not count."""


class Offload:
    """Any thread; without state of its own."""

    def __init__(
        self, copier: BlockCopier, rows: Rows, codec: Codec | None, layout: KVLayout, staging: Staging
    ) -> None:
        self._copier, self._rows, self._codec, self._layout, self._staging = copier, rows, codec, layout, staging
        self._batch = min(max(1, BATCH_BYTES // layout.block_bytes), staging.slots)

    def copy(self, blocks: Sequence[BlockId], slots: Sequence[Slot], known: Sequence[int | None]) -> list[int | None]:
        """Each block into the slot of the same index. Returns digests as SlotHeader has them: of a block as it is the
        `known` one where there is one. None: that block cannot be stored, and its slot holds anything."""
        digests: list[int | None] = []
        for begin in range(0, len(blocks), self._batch):
            some = slice(begin, begin + self._batch)
            copy = self._copy_plain if self._codec is None else self._copy_encoded
            digests += copy(blocks[some], slots[some], known[some])
        return digests

    def _copy_plain(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], known: Sequence[int | None]
    ) -> list[int | None]:
        self._copier.gather(blocks, self._rows, slots)
        unknown = [i for i, digest in enumerate(known) if digest is None]
        digests = list(known)
        for i, digest in zip(unknown, row_digests(self._rows, [slots[i] for i in unknown], self._layout), strict=True):
            digests[i] = digest
        return digests

    def _copy_encoded(
        self, blocks: Sequence[BlockId], slots: Sequence[Slot], known: Sequence[int | None]
    ) -> list[int | None]:
        assert self._codec is not None and len(known) == len(blocks)
        with self._staging.taken() as plain:
            self._copier.gather(blocks, plain, first_slots(len(blocks)))
            refused = set(self._codec.encode(plain[: len(blocks)], self._rows, slots))
        digests = stored_digests(self._rows, slots, self._codec.stored_bytes)
        return [None if i in refused else digest for i, digest in enumerate(digests)]


def row_digests(rows: Rows, slots: Sequence[Slot], layout: KVLayout) -> list[int]:
    """baton.digest's, of blocks that lie in rows as they are."""
    if not slots:
        return []
    slices, some = slices_of(rows, layout), places(slots)
    return digests_of(layout.layers, lambda layer, kv: slices[some, layer, kv])
