"""A pool in host memory with the real tiers below it: real threads, a real file."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baton.digest import digests_of
from baton.ids import BlockHash, BlockId, tenant_tag
from baton.layout import KVLayout
from kvcache.block_pool import BlockPool
from kvcache.tiers.disk.disk_calls import DiskCalls
from kvcache.tiers.disk.slot_format import HEADERS_OFFSET, slot_bytes
from kvcache.tiers.interface import Owner, StorageFormat
from kvcache.tiers.opening import open_tiers
from kvcache.tiers.pages import whole_pages
from kvcache.tiers.rows.copier import HostCopier
from tests.kvcache.tiers.store_world import ROOT

Slices = NDArray[np.uint8]
OWNER = Owner(tenant_tag("a"))
WAIT_TURNS = 10_000
TURN_S = 0.001


def small_layout(blocks: int) -> KVLayout:
    """Blocks of 8 KiB."""
    return KVLayout(layers=2, blocks=blocks, block_tokens=8, kv_heads=2, head_dim=64, dtype="float16")


class StoreRig:
    """An engine that computes a block's content from its name."""

    def __init__(
        self,
        directory: Path | None,
        *,
        blocks: int = 32,
        ddr_slots: int = 16,
        ssd_slots: int = 64,
        kv_compression: StorageFormat = "none",
        fingerprint: str = "model",
        calls: DiskCalls = DiskCalls(),  # noqa: B008 - frozen
        wall_clock: Callable[[], float] = lambda: 1.7e9,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout = small_layout(blocks)
        self.memory = np.zeros(layout.region_bytes, np.uint8)
        self.region = self.memory.reshape(layout.layers, 2, layout.blocks, layout.slice_bytes)
        store = open_tiers(
            layout=layout,
            fingerprint=fingerprint,
            ddr_bytes=ddr_slots * whole_pages(layout.block_bytes),
            ssd_dir=directory,
            ssd_bytes=HEADERS_OFFSET + ssd_slots * slot_bytes(layout.block_bytes) if directory else 0,
            kv_compression=kv_compression,
            bytes_in_flight_max=8 * layout.block_bytes,
            copier=HostCopier(memoryview(self.memory), layout),
            digests=self.digests,
            saved_s=lambda _: 0.01,
            verify_ddr="always",
            clock=clock,
            wall_clock=wall_clock,
            calls=calls,
        )
        assert store is not None
        self.store = store
        self.woken = threading.Event()
        store.wake = self.woken.set
        self.pool = BlockPool(layout.pool_blocks, store)
        self.wrong: list[BlockHash] = []
        """Restored blocks that were not what they should be."""
        self.restored = 0
        self.computed = 0

    def digests(self, blocks: Sequence[BlockId], layers: range) -> list[int]:
        return digests_of(self.layout.layers, lambda layer, kv: self.region[layer, kv, list(blocks)], layers)

    def content(self, name: BlockHash) -> Slices:
        """Of all its slices: numbers that float16 and int8 can hold."""
        numbers = np.random.default_rng(list(name)).standard_normal(self.layout.block_bytes // 2)
        return numbers.astype(np.float16).view(np.uint8).reshape(self.layout.layers, 2, self.layout.slice_bytes)

    def is_right(self, block: BlockId, name: BlockHash) -> bool:
        return bool((self.region[:, :, block] == self.content(name)).all())

    def run(self, names: Sequence[BlockHash], owner: Owner = OWNER) -> int:
        """Serves a prompt; how many of its blocks were found, in whatever tier."""
        match = self.pool.match(names)
        hits = len(match.blocks)
        self.pool.hold(match.blocks)
        below = len(self.store.locate(names[hits:]))
        self.store.used(names[: hits + below], owner)
        new = self.pool.allocate(len(names) - hits)
        good = 0
        if below:
            result = self.store.restore(names[hits : hits + below], new[:below]).wait(10.0)
            assert result is not None
            good = result.good
            self.wrong += [
                name for block, name in zip(new[:good], names[hits:], strict=False) if not self.is_right(block, name)
            ]
        for block, name in zip(new[good:], names[hits + good :], strict=True):
            self.region[:, :, block] = self.content(name)
        self.store.published(ROOT, names, hits, owner)
        for block, name in zip(new, names[hits:], strict=True):
            self.pool.publish(block, name)
        self.pool.release([*match.blocks, *new])
        self.restored += good
        self.computed += len(names) - hits - good
        self.store.pump(self.pool)
        return hits + good

    def settle(self) -> None:
        """Until nothing moves any more: each turn begins what the one before made room for."""
        for _ in range(WAIT_TURNS):
            self.store.pump(self.pool)
            if self.store.is_settled:
                return
            self.woken.wait(TURN_S)
            self.woken.clear()
        raise AssertionError("it never settles")

    def close(self) -> None:
        self.store.close()
        assert not self.pool.holders()
