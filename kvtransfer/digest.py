"""The digest that goes with a KV block from where it was computed to where it is used.

It is defined on the block's bytes, slice by slice, in arithmetic modulo 2^64, which torch and numpy do alike on any
device, and as fast as memory can be read. With x the little-endian 64-bit words of a slice (a slice whose size is no
multiple of 8 is filled up with zeros), a layer's keys (kv = 0) or values (kv = 1):

    slice digest  s = sum_i w_i * x_i + v_i * (x_i >> 32)        (an arithmetic shift)
    block digest  d = sum over layer, kv of c_(2 * layer + kv) * s(layer, kv)

w, v and c are fixed odd numbers. Any change of one word is seen, and any other by all but one in 2^31 of the choices of
w, v and c at the very least: the second sum is there because two changes of a top bit would cancel in the first.
It guards against errors, not against a forger: who may write at all is the transports' to say.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockId
from baton.layout import KVLayout

BATCH_BYTES = 512 * 1024
"""Digested at a time, so that what is computed on the way stays in the processor's cache."""
_SEED = 0x6B76_6261_746F_6E31


@lru_cache(maxsize=16)
def word_weights(words: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """w and v for a slice of so many words."""
    odd = _odd_numbers(2 * words, _SEED)
    return odd[0::2].copy(), odd[1::2].copy()


@lru_cache(maxsize=16)
def slice_weights(layers: int) -> NDArray[np.int64]:
    """c, shaped [layer][k|v]."""
    return _odd_numbers(2 * layers, _SEED + 1).reshape(layers, 2)


def _odd_numbers(count: int, seed: int) -> NDArray[np.int64]:
    """The first `count` numbers of a fixed sequence: how many are taken changes none of them (SplitMix64)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def slice_digests(slices: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of each row of bytes, contiguous: one slice each."""
    words = slices
    if slices.shape[1] % 8:
        words = np.pad(slices, ((0, 0), (0, -slices.shape[1] % 8)))
    x = words.view(np.int64)
    low, high = word_weights(x.shape[1])
    digests: NDArray[np.int64] = x @ low + (x >> 32) @ high
    return digests


def block_digests(memory: memoryview, layout: KVLayout, blocks: Sequence[BlockId]) -> list[int]:
    """Of each block of a region in host memory, as unsigned 64-bit numbers."""
    region = np.frombuffer(memory, np.uint8, layout.region_bytes)
    region = region.reshape(layout.layers, 2, layout.blocks, layout.slice_bytes)
    weights = slice_weights(layout.layers)
    step = max(1, BATCH_BYTES // layout.slice_bytes)
    digests = np.zeros(len(blocks), np.int64)
    for begin in range(0, len(blocks), step):
        some = slice(begin, begin + step)
        for layer in range(layout.layers):
            for kv in (0, 1):
                digests[some] += weights[layer, kv] * slice_digests(_rows(region[layer, kv], blocks[some]))
    return [int(digest) for digest in digests.view(np.uint64)]


def _rows(slices: NDArray[np.uint8], blocks: Sequence[BlockId]) -> NDArray[np.uint8]:
    """A view where the blocks are adjacent, else a copy."""
    first, last = blocks[0], blocks[-1]
    if last - first == len(blocks) - 1 and all(b - a == 1 for a, b in zip(blocks, blocks[1:], strict=False)):
        return slices[first : last + 1]
    return slices[np.asarray(blocks)]
