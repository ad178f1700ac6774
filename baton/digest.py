"""The digest that goes with a KV block from where it was computed to where it is used.

It is defined on the block's bytes, slice by slice, in arithmetic modulo 2^64, which torch and numpy do alike on any
device. With x the little-endian 64-bit words of a slice (a slice whose size is no multiple of 8 is filled up with
zeros), a layer's keys (kv = 0) or values (kv = 1):

    slice digest  s = sum_i w_i * x_i + v_i * (x_i >> 32)        (an arithmetic shift)
    block digest  d = sum over layer, kv of c_(2 * layer + kv) * s(layer, kv)

w, v and c are fixed odd numbers, so a change within one 32-bit half of one word - a bit, a byte, one number of any
dtype - is always seen. Any other change of one slice is missed by at most one in 2^32 of the choices of w and v:
the top bits that w * x alone would let cancel are low ones in x >> 32. (Proof: let a and b be by how much a changed
word and its upper half differ. Over odd w_i and v_i, a * w_i + b * v_i takes each of its values with a probability of
2^-(63 - t) at most, where 2^t is the largest power of two that divides both, and t < 32.) Of changes in several slices
at once, those whose weighted sums over the slices happen to be divisible by more than 2^32 come on top: at the very
worst, one in 2^25 is missed. A block does not know its place: that it landed in another's is seen because every place
is compared with its own digest.

It guards against errors, not against a forger: who may write at all is the transports' to say.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, reduce

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockId
from baton.layout import KVLayout

WORD_BYTES = 8
BATCH_BYTES = 512 * 1024
"""Digested at a time, so that the words and their upper halves stay in the processor's cache."""
_SEED = 0x6B76_6261_746F_6E31

Rows = slice | NDArray[np.intp]
"""Which of a region's blocks, as numpy takes it: adjacent ones are a view, others are copied together."""


class _Scratch(threading.local):
    """Each thread's own: with fresh memory for each batch, the kernel's work at its pages is more than the digest's."""

    def __init__(self) -> None:
        self.words = np.empty(BATCH_BYTES // WORD_BYTES, np.int64)
        self.slices = np.empty(BATCH_BYTES, np.uint8)


_scratch = _Scratch()


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


def slice_words(slice_bytes: int) -> int:
    """The last one may be filled up."""
    return -(-slice_bytes // WORD_BYTES)


def slice_digests(slices: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of each row of bytes, contiguous: one slice each. All together should fit in the processor's cache."""
    if slices.shape[1] % WORD_BYTES:
        slices = np.pad(slices, ((0, 0), (0, -slices.shape[1] % WORD_BYTES)))
    words = slices.view("<i8")
    low, high = word_weights(words.shape[1])
    return _dot(words, low) + _dot(_upper_halves(words), high)


def _upper_halves(words: NDArray[np.int64]) -> NDArray[np.int64]:
    if words.nbytes > BATCH_BYTES:
        return words >> 32
    return np.right_shift(words, 32, out=_scratch.words[: words.size].reshape(words.shape))


def _dot(words: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Modulo 2^64, by rows. Numpy's products of integer matrices take twice as long as its einsum."""
    dots: NDArray[np.int64] = np.einsum("rw,w->r", words, weights)
    return dots


def block_digests(
    memory: memoryview, layout: KVLayout, blocks: Sequence[BlockId], layers: range | None = None
) -> list[int]:
    """Of each block of a region in host memory, as unsigned 64-bit numbers; or what these layers add to it."""
    region = np.frombuffer(memory, np.uint8, layout.region_bytes)
    region = region.reshape(layout.layers, 2, layout.blocks, layout.slice_bytes)
    digests: list[int] = []
    for rows in _batches(blocks, max(1, BATCH_BYTES // layout.slice_bytes)):
        digests += _digests(region, rows, layers)
    return digests


def _digests(region: NDArray[np.uint8], rows: Rows, some: range | None) -> list[int]:
    """`region` is [layer][k|v][block][bytes of a slice]."""
    return digests_of(region.shape[0], lambda layer, kv: _picked(region[layer, kv], rows), some)


def _picked(slices: NDArray[np.uint8], rows: Rows) -> NDArray[np.uint8]:
    """To be used before the thread picks others."""
    size = slices.shape[1]
    if isinstance(rows, slice) or len(rows) * size > BATCH_BYTES:
        return slices[rows]
    picked = _scratch.slices[: len(rows) * size].reshape(-1, size)
    return np.take(slices, rows, axis=0, out=picked, mode="clip")  # any other mode takes a detour


def digests_of(layers: int, slices: Callable[[int, int], NDArray[np.uint8]], some: range | None = None) -> list[int]:
    """Of some blocks whose `slices` of a layer's keys (0) or values (1) are [block][bytes of a slice]; or what `some`
    of their layers add to it, see `sum_of`."""
    weights = slice_weights(layers)
    terms = (
        weights[layer, kv] * slice_digests(slices(layer, kv))
        for layer in (range(layers) if some is None else some)
        for kv in (0, 1)
    )
    return unsigned(reduce(np.add, terms))


def sum_of(*parts: int) -> int:
    """The digest of a block, from what all its layers add to it."""
    return sum(parts) % 2**64


def _batches(blocks: Sequence[BlockId], size: int) -> Iterator[Rows]:
    for begin in range(0, len(blocks), size):
        some = np.asarray(blocks[begin : begin + size], np.intp)
        is_run = bool((np.diff(some) == 1).all())
        yield slice(int(some[0]), int(some[-1]) + 1) if is_run else some


def unsigned(digests: NDArray[np.int64]) -> list[int]:
    """As messages carry them."""
    return [int(digest) for digest in digests.view(np.uint64)]
