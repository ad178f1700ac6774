"""How fast the tiers are, before anything is served."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Final

from baton.ids import BlockHash, BlockId
from kvcache.tiers.index.shelves import Shelves
from kvcache.tiers.index.tenants import NO_TAG
from kvcache.tiers.interface import LowerTier, RestoreTiming, Slot, SlotHeader
from kvcache.tiers.io.interface import RestorePart
from kvcache.tiers.moves.store_io import StoreIo

TEST_BYTES: Final = 8 * 2**20
TEST_WAIT_S: Final = 5.0
"""For each copy: a disk that needs longer is not timed."""


def time_restores(
    shelves: Shelves, io: StoreIo, pool_blocks: int, block_bytes: int, bytes_max: int
) -> Sequence[RestoreTiming]:
    """Copies the first blocks of a pool that nobody uses yet down and up again, through slots that are free."""
    count = min(min(TEST_BYTES, bytes_max) // block_bytes, pool_blocks)
    blocks = [BlockId(block) for block in range(count)]
    ddr = shelves.slots["ddr"].take(count)
    try:
        digests = io.offload_now(blocks[: len(ddr)], ddr, [None] * len(ddr))
        if not ddr or None in digests:
            return []
        known = [digest for digest in digests if digest is not None]
        parts = [_part(shelves, "ddr", *each) for each in zip(ddr, _names(ddr), known, blocks, strict=False)]
        return [*_timed(io, parts), *_test_ssd(shelves, io, ddr, known, blocks)]
    finally:
        for slot in ddr:
            shelves.slots["ddr"].give_back(slot)


def _test_ssd(
    shelves: Shelves, io: StoreIo, ddr: Sequence[Slot], digests: Sequence[int], blocks: Sequence[BlockId]
) -> Sequence[RestoreTiming]:
    """Through free slots, which are erased after it; a file that is full is not timed until it serves."""
    slots = shelves.slots["ssd"].take(len(ddr)) if shelves.has_ssd else []
    if not slots:
        return []
    names = list(_names(slots))
    headers = [
        SlotHeader(name, BlockHash(bytes(16)), 0, digest, shelves.storage, NO_TAG)
        for name, digest in zip(names, digests, strict=False)
    ]
    job = io.demote(ddr[: len(slots)], slots, headers)
    if not job.wait(TEST_WAIT_S):
        return []  # and its slots are never used
    parts = [_part(shelves, "ssd", *each) for each in zip(slots, names, digests, blocks, strict=False)]
    timings = [] if job.error else _timed(io, parts)
    for slot in slots:
        shelves.slots["ssd"].give_back(slot, erase=True)
    if job.error:
        shelves.turn_off_ssd(f"it could not be written ({job.error.strerror or job.error}).")
    return timings


def _names(slots: Sequence[Slot]) -> Iterator[BlockHash]:
    return (BlockHash(secrets.token_bytes(16)) for _ in slots)


def _part(shelves: Shelves, tier: LowerTier, slot: Slot, name: BlockHash, digest: int, block: BlockId) -> RestorePart:
    return RestorePart(tier, slot, name, digest, shelves.storage, block)


def _timed(io: StoreIo, parts: Sequence[RestorePart]) -> Sequence[RestoreTiming]:
    restore = io.restore(parts)
    result = restore.wait(TEST_WAIT_S)
    restore.cancel()
    return result.timings if result is not None and result.good == len(parts) else ()
