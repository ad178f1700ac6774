"""Digests of KV blocks by torch, on the device where they lie; baton/digest.py says what they are.

A step's blocks are digested after it, all layers at once: on a device that is a few kernels behind those of the step,
where layer by layer it would be a few for each, and on the CPU the bytes have left the cache by then either way.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from baton.digest import WORD_BYTES, slice_weights, slice_words, unsigned, word_weights
from baton.ids import BlockId
from kvtransfer.interface import Region

HOST_BATCH_BYTES = 512 * 1024
DEVICE_BATCH_BYTES = 64 * 2**20
"""Digested at a time, which takes up to three times as much on the way."""


class Digesting(Protocol):
    """Digests that are being computed."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""

    def wait(self) -> tuple[int, ...]: ...


class Digester(Protocol):
    """What an engine has its blocks digested by, on its own thread."""

    def begin(self, blocks: Sequence[BlockId]) -> Digesting:
        """Of each block as it lies once the writes that were issued so far are done. Waits for no device."""


class Digested:
    """Implements Digesting for what is there already."""

    is_done = True

    def __init__(self, digests: Sequence[int]) -> None:
        self._digests = tuple(digests)

    def wait(self) -> tuple[int, ...]:
        return self._digests


class RegionDigester:
    """For a region whose digests need no device."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def begin(self, blocks: Sequence[BlockId]) -> Digesting:
        return Digested(self._region.digests(blocks))


class DeviceDigester:
    """Of a region's tensor, shaped as its layout says, which must outlive it; on the caller's current stream."""

    def __init__(self, pages: Tensor) -> None:
        slices = pages.flatten(3)
        self._slice_bytes = slices.shape[-1] * slices.itemsize
        is_whole = not self._slice_bytes % WORD_BYTES
        self._slices = slices.view(torch.int64 if is_whole else torch.uint8)
        """[layer][k|v][block][word of the slice, or byte where these make no whole words]"""
        low, high = word_weights(slice_words(self._slice_bytes))
        self._low = torch.from_numpy(low).to(pages.device)
        self._high = torch.from_numpy(high).to(pages.device)
        self._weights = torch.from_numpy(slice_weights(pages.shape[0])).to(pages.device)[..., None]

    def begin(self, blocks: Sequence[BlockId], layers: range | None = None) -> Digesting:
        """Or of what these layers add to them."""
        digests = self.digests(blocks, layers)
        return OnDevice(digests) if digests.is_cuda else Digested(_as_told(digests))

    def digests(self, blocks: Sequence[BlockId], layers: range | None = None) -> Tensor:
        """Int64 [blocks]."""
        layers = range(self._slices.shape[0]) if layers is None else layers
        total = torch.zeros(len(blocks), dtype=torch.int64, device=self._slices.device)
        rows = self._rows(blocks)
        step = self._layers_at_a_time(len(blocks))
        for first in layers[::step]:
            some = slice(first, min(first + step, layers.stop))
            total += (self._slice_digests(self._pick(some, rows)) * self._weights[some]).sum((0, 1))
        return total

    def _layers_at_a_time(self, blocks: int) -> int:
        batch_bytes = DEVICE_BATCH_BYTES if self._slices.is_cuda else HOST_BATCH_BYTES
        return max(1, batch_bytes // max(1, 2 * blocks * self._slice_bytes))

    def _rows(self, blocks: Sequence[BlockId]) -> slice | Tensor:
        if blocks and all(after == block + 1 for block, after in pairwise(blocks)):
            return slice(blocks[0], blocks[-1] + 1)
        index = torch.tensor(blocks, dtype=torch.long, pin_memory=self._slices.is_cuda)
        return index.to(self._slices.device, non_blocking=True)

    def _pick(self, layers: slice, rows: slice | Tensor) -> Tensor:
        """Int64 [layers][k|v][blocks][words]."""
        slices = self._slices[layers]
        slices = slices[:, :, rows] if isinstance(rows, slice) else slices.index_select(2, rows)
        if slices.dtype == torch.int64:
            return slices
        return torch.nn.functional.pad(slices, (0, -self._slice_bytes % WORD_BYTES)).view(torch.int64)

    def _slice_digests(self, words: Tensor) -> Tensor:
        """[...][words] to [...]."""
        return _dot(words, self._low) + _dot(words >> 32, self._high)


class OnDevice:
    """Implements Digesting for what a CUDA device computes: it is read back behind it, and nobody waits before they
    want to know."""

    def __init__(self, digests: Tensor) -> None:
        self._host = torch.empty(digests.shape, dtype=digests.dtype, pin_memory=True)
        self._host.copy_(digests, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(digests.device))

    @property
    def is_done(self) -> bool:
        is_done: bool = self._event.query()
        return is_done

    def wait(self) -> tuple[int, ...]:
        self._event.synchronize()
        return _as_told(self._host)


def _dot(words: Tensor, weights: Tensor) -> Tensor:
    """Modulo 2^64. CUDA has no products of matrices of integers."""
    if words.is_cuda:
        return (words * weights).sum(-1)
    return torch.mv(words.reshape(-1, words.shape[-1]), weights).view(words.shape[:-1])


def _as_told(digests: Tensor) -> tuple[int, ...]:
    return tuple(unsigned(np.ascontiguousarray(digests.numpy())))
