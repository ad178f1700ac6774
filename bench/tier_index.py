"""What a worker's index of its blocks costs: memory a block and time, by how many it knows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from baton.ids import BlockHash, tenant_tag
from kvcache.block_hash import HASH_BYTES
from kvcache.tiers.index.tier_index import TierIndex

PROMPT_BLOCKS = 32
LOOKED_UP = 128
LOOK_UPS = 300
REMOVED_MAX = 20_000


@dataclass(frozen=True, slots=True)
class IndexCost:
    """Of an index that is full: a tenth of its blocks in HBM, three in DDR, six on the SSD."""

    blocks: int
    bytes_per_block: float
    add_s: float
    """Each of these three: one block."""
    find_s: float
    """As one of LOOKED_UP names that are looked up together, all over the index."""
    remove_s: float


def measure_index(blocks: int, seed: int = 0, told: Callable[[int], None] = lambda _: None) -> IndexCost:
    """`told` hears now and then how many blocks have been added. A minute and a gigabyte for ten million."""
    random = Random(seed)
    names = random.randbytes(HASH_BYTES * blocks)
    hbm, ddr = blocks // 10, blocks * 3 // 10
    index = TierIndex(hbm, ddr, blocks - hbm - ddr)
    begun_s = time.thread_time()
    for number in range(blocks):
        _add(index, names, number, hbm, ddr)
        if number % 100_000 == 0:
            told(number)
    added_s = time.thread_time()
    for _ in range(LOOK_UPS):
        index.table.find_all([_name(names, random.randrange(blocks)) for _ in range(LOOKED_UP)])
    found_s = time.thread_time()
    size_bytes = index.size_bytes
    removed = min(blocks, REMOVED_MAX)
    for number in range(blocks - removed, blocks):
        index.drop(
            index.find(_name(names, number)), "ssd" if number >= hbm + ddr else "ddr" if number >= hbm else "hbm"
        )
    ended_s = time.thread_time()
    return IndexCost(
        blocks,
        size_bytes / blocks,
        (added_s - begun_s) / blocks,
        (found_s - added_s) / (LOOK_UPS * LOOKED_UP),
        (ended_s - found_s) / removed,
    )


def _name(names: bytes, number: int) -> BlockHash:
    return BlockHash(names[number * HASH_BYTES : (number + 1) * HASH_BYTES])


def _add(index: TierIndex, names: bytes, number: int, hbm: int, ddr: int) -> None:
    depth = number % PROMPT_BLOCKS
    parent = _name(names, number - 1) if depth else BlockHash(bytes(HASH_BYTES))
    row = index.add(_name(names, number), parent, depth, tenant_tag("tenant"), 0.0)
    if number < hbm:
        index.put(row, "hbm", number)
    elif number < hbm + ddr:
        index.put(row, "ddr", number - hbm)
    else:
        index.put(row, "ssd", number - hbm - ddr)
