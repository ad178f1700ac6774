"""How small a block becomes, and how long that takes: the codec alone, on one thread."""

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from baton.layout import KVLayout
from kvcache.tiers.interface import Rows, Slot
from kvcache.tiers.rows.codec import Int8Codec
from kvcache.tiers.rows.narrow_floats import narrow

BLOCKS = 64
REPEATS = 5


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    dtype: str
    block_bytes: int
    stored_bytes: int
    encode_gb_per_s: float
    """Of KV as it lies in HBM, in both directions."""
    decode_gb_per_s: float

    @property
    def share(self) -> float:
        """Of the block, what is stored."""
        return self.stored_bytes / self.block_bytes


def measure_codec(layout: KVLayout, blocks: int = BLOCKS, repeats: int = REPEATS, seed: int = 0) -> CodecSpeed:
    """Of normally distributed KV. The first round, in which memory is touched, does not count."""
    codec = Int8Codec(layout)
    plain, slots = random_rows(layout, blocks, seed), [Slot(slot) for slot in range(blocks)]
    stored = np.zeros((blocks, codec.stored_bytes), np.uint8)
    encode_s, decode_s = [], []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        refused = codec.encode(plain, stored, slots)
        encoded_s = time.perf_counter()
        codec.decode(stored, slots, plain)
        decode_s.append(time.perf_counter() - encoded_s)
        encode_s.append(encoded_s - began_s)
        assert not refused
    size_bytes = blocks * layout.block_bytes
    rates = [size_bytes / median(seconds[1:]) / 1e9 for seconds in (encode_s, decode_s)]
    return CodecSpeed(layout.dtype, layout.block_bytes, codec.stored_bytes, *rates)


def random_rows(layout: KVLayout, blocks: int, seed: int) -> Rows:
    """Blocks as they lie below HBM, uncompressed: [block][byte]."""
    rows = np.zeros((blocks, layout.block_bytes), np.uint8)
    slices = rows.reshape(blocks * layout.layers * 2, layout.slice_bytes)
    numbers = layout.block_tokens * layout.kv_heads * layout.head_dim
    x = np.random.default_rng(seed).standard_normal((len(slices), numbers), np.float32)
    narrow(x, slices, layout.dtype)
    return rows
