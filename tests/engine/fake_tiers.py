"""Lower tiers that keep what the pool evicts in a dict, and bring it up when a test says so."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from toy_engine import ToyRegion

from baton.ids import BlockHash, BlockId, TenantTag
from baton.latency import Tier
from kvcache.tiers.interface import (
    HotPrefix,
    LowerTier,
    Owner,
    PoolView,
    Restored,
    RestoreTiming,
    TierState,
)
from kvtransfer.region import HostRegion

Row = Any


class ToyRows:
    """A toy region's blocks know no layers: all there is lands with the first."""

    def __init__(self, region: ToyRegion) -> None:
        self.region, self.layers = region, region.layout.layers

    def save(self, block: BlockId) -> Row:
        return list(self.region.entries[block])

    def load(self, row: Row, layer: int, block: BlockId) -> None:
        if layer == 0:
            self.region.entries[block] = list(row)

    def spoil(self, block: BlockId) -> None:
        self.region.entries[block] = [b"spoiled"] * self.region.layout.block_tokens

    def digest(self, block: BlockId) -> int:
        return int(self.region.digests([block])[0])


class HostRows:
    def __init__(self, region: HostRegion) -> None:
        layout = region.layout
        self.region, self.layers = region, layout.layers
        whole = np.frombuffer(region.memory, np.uint8, layout.region_bytes)
        self._bytes = whole.reshape(layout.layers, 2, layout.blocks, layout.slice_bytes)

    def save(self, block: BlockId) -> Row:
        return self._bytes[:, :, block].copy()

    def load(self, row: Row, layer: int, block: BlockId) -> None:
        self._bytes[layer, :, block] = row[layer]

    def spoil(self, block: BlockId) -> None:
        self._bytes[:, :, block] = 255  # not a number, in any floating point format

    def digest(self, block: BlockId) -> int:
        return int(self.region.digests([block])[0])

    def close(self) -> None:
        del self._bytes


@dataclass
class FakeRestore:
    """Implements Restore. Lands a layer when `land` is called or, unless it stalls, when it is waited for."""

    tiers: "FakeTiers"
    names: Sequence[BlockHash]
    blocks: Sequence[BlockId]
    layers: int = 0
    result: Restored | None = None
    stalls: bool = False
    left_s: float = 1e9
    """So long that no step begins before the end, unless a test says otherwise."""
    waited_for: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows = [self.tiers.rows.get(name) for name in self.names]
        for block in self.blocks:
            self.tiers.store.spoil(block)

    def land(self, layers: int = 1) -> None:
        for layer in range(self.layers, min(self.layers + layers, self.tiers.store.layers)):
            for kept, block in zip(self._rows, self.blocks, strict=True):
                if kept is not None:
                    self.tiers.store.load(kept.row, layer, block)
            self.layers += 1
        self.tiers.wake()

    def finish(self) -> None:
        """Lands what is left, and verifies all."""
        if self.result is not None:
            return
        self.land(self.tiers.store.layers)
        good = self._good()
        digests = tuple(kept.digest for kept in self._rows[:good] if kept is not None)
        for name, block in list(zip(self.names, self.blocks, strict=True))[good:]:
            self.tiers.store.spoil(block)
            self.tiers.forget(name)
        reason = "" if good == len(self.names) else "A block is corrupt."
        self.result = Restored(good, digests, (RestoreTiming("ddr", 100 * good, 0.001),), reason)
        self.tiers.wake()

    def _good(self) -> int:
        for index, (name, kept) in enumerate(zip(self.names, self._rows, strict=True)):
            if kept is None or name in self.tiers.corrupt:
                return index
        return len(self.names)

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        self.waited_for.append(layer)
        if self.stalls:
            self.tiers.pass_time(timeout_s)
        elif self.result is None:
            self.land(layer + 1 - self.layers)
        return self.layers > layer

    def wait(self, timeout_s: float) -> Restored | None:
        if self.stalls:
            self.tiers.pass_time(timeout_s)
        else:
            self.finish()
        return self.result

    def cancel(self) -> None:
        if self.result is None:
            for block in self.blocks:
                self.tiers.store.spoil(block)
            self.result = Restored(0, (), (), "Given up.")


@dataclass(frozen=True)
class Kept:
    row: Row
    digest: int
    tier: LowerTier


class FakeTiers:
    """Implements LowerTiers."""

    def __init__(self, store: Any, blocks_max: int = 1 << 20, *, at_once: bool = True) -> None:
        """`at_once`: restores have ended when they begin."""
        self.store, self.blocks_max, self.at_once = store, blocks_max, at_once
        self.wake: Callable[[], None] = lambda: None
        self.rows: dict[BlockHash, Kept] = {}
        self.in_hbm: dict[BlockHash, BlockId] = {}
        self.known: set[BlockHash] = set()
        self.tenants: dict[BlockHash, TenantTag] = {}
        self.corrupt: set[BlockHash] = set()
        self.restores: list[FakeRestore] = []
        self.stalls, self.left_s = False, 1e9
        self.tier: LowerTier = "ddr"
        self.pass_time: Callable[[float], None] = lambda _: None
        self.digests: dict[BlockHash, int] = {}
        self.uses: list[tuple[int, Owner]] = []
        self.pumps = 0
        self.copies_down_early = False
        self.is_closed = False
        self.is_settled = True
        self._removed: list[tuple[BlockId, BlockHash]] = []
        self._changed: dict[BlockHash, None] = {}
        self._lent: deque[tuple[BlockId, BlockHash]] = deque()

    # ---- the pool

    def stored(self, block: BlockId, name: BlockHash) -> None:
        assert name in self.known, "stored before it was published"
        self.in_hbm[name] = block
        self._changed[name] = None

    def removed(self, block: BlockId, name: BlockHash) -> None:
        assert self.in_hbm.pop(name) == block
        self._removed.append((block, name))
        self.digests.pop(name, None)
        self._changed[name] = None

    def flush(self) -> None:
        for block, name in self._removed:
            self._keep(block, name)
        self._removed.clear()

    def _keep(self, block: BlockId, name: BlockHash) -> None:
        if name not in self.rows:
            self.rows[name] = Kept(self.store.save(block), self.store.digest(block), self.tier)
            self._changed[name] = None
        while len(self.rows) > self.blocks_max:
            self.forget(next(iter(self.rows)))

    def forget(self, name: BlockHash) -> None:
        self.rows.pop(name, None)
        self._changed[name] = None

    # ---- the engine

    def published(self, root: BlockHash, names: Sequence[BlockHash], first: int, owner: Owner) -> None:
        assert 0 <= first < len(names) and len(root) == 16 and owner.tenant
        self.known.update(names)
        self.tenants.update(dict.fromkeys(names[first:], owner.tenant))

    def used(self, names: Sequence[BlockHash], owner: Owner) -> None:
        assert all(self.tier_of(name) for name in names)
        self.uses.append((len(names), owner))

    def digested(self, names: Sequence[BlockHash], digests: Sequence[int]) -> None:
        for name, digest in zip(names, digests, strict=True):
            assert self.store.digest(self.in_hbm[name]) == digest
            self.digests[name] = digest

    def pump(self, pool: PoolView) -> None:
        """What was lent at the last turn goes down, and others are lent until the next."""
        self.pumps += 1
        while self._lent:
            block, name = self._lent.popleft()
            self._keep(block, name)
            pool.release([block], is_used=False)
        if self.copies_down_early:
            self._lent.extend([pair for pair in pool.upcoming(4) if pair[1] not in self.rows][:2])
            pool.hold([block for block, _ in self._lent])

    def locate(self, names: Sequence[BlockHash]) -> Sequence[LowerTier]:
        found: list[LowerTier] = []
        for name in names:
            if name not in self.rows:
                break
            found.append(self.rows[name].tier)
        return found

    def restore(self, names: Sequence[BlockHash], blocks: Sequence[BlockId]) -> FakeRestore:
        assert len(names) == len(blocks) > 0
        restore = FakeRestore(self, names, blocks, stalls=self.stalls, left_s=self.left_s)
        self.restores.append(restore)
        if self.at_once:
            restore.finish()
        return restore

    def tier_of(self, name: BlockHash) -> Tier | None:
        if name in self.in_hbm:
            return "hbm"
        return self.rows[name].tier if name in self.rows else None

    def tenant_of(self, name: BlockHash) -> TenantTag | None:
        return self.tenants.get(name)

    def changed(self) -> Sequence[BlockHash]:
        changed, self._changed = tuple(self._changed), {}
        return changed

    # ---- operators

    def clear(self, tenant: TenantTag | None) -> tuple[int, int]:
        self._removed.clear()
        its = [name for name in self.rows if tenant in (None, self.tenants.get(name))]
        for name in its:
            self.forget(name)
        return len(its), 0

    def states(self) -> Sequence[TierState]:
        return ()

    def hottest(self, count: int) -> Sequence[HotPrefix]:
        del count
        return ()

    def note_copies(self, copies: Sequence[tuple[BlockHash, int]]) -> None: ...

    def doubtful(self, count: int) -> Sequence[BlockHash]:
        del count
        return ()

    def pin(self, names: Sequence[BlockHash], until_s: float) -> None: ...

    def self_test(self) -> Sequence[RestoreTiming]:
        return ()

    dropped_blocks = corrupt_blocks = 0

    def check_integrity(self) -> None:
        assert len(self.rows) <= self.blocks_max
        for name, digest in self.digests.items():
            assert self.store.digest(self.in_hbm[name]) == digest

    def close(self) -> None:
        self.is_closed = True
        if hasattr(self.store, "close"):
            self.store.close()
