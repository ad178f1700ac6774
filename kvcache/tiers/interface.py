"""The tiers below HBM as their parts, and the engine, see each other.

A block below HBM is one contiguous row of bytes, `[layer][k|v][slice]`, in a *slot* of host memory (DDR) or of a file
(SSD). The engine's thread decides and keeps the index; a few I/O threads copy, and never touch the index.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NewType, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash, BlockId, TenantTag
from baton.latency import Tier

LowerTier = Literal["ddr", "ssd"]
StorageFormat = Literal["none", "int8"]
"""How a row is stored: as it is, or compressed."""
Slot = NewType("Slot", int)
Rows = NDArray[np.uint8]
"""Host memory by slots: [slot][byte]."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose blocks, and how long they are promised to be kept."""

    tenant: TenantTag
    ttl_s: float = 0.0
    """From the last use; 0: no promise."""
    pin: bool = False
    quota_bytes: int = 0
    """What the tenant may keep under a promise, below HBM on this worker."""


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a slot says of its block."""

    name: BlockHash
    parent: BlockHash
    """Its predecessor in the prompt; of the first block: the root that names follow from."""
    depth: int
    """Its place in the prompt, in blocks."""
    digest: int
    """Uncompressed: baton.digest's of the block. Compressed: of the stored bytes, as if they were one slice."""
    storage: StorageFormat
    tenant: TenantTag
    keep_until: float = 0.0
    """Seconds since 1970; 0: no promise; infinite: pinned."""


class BlockCopier(Protocol):
    """Between the worker's pool and rows of host memory. Any thread; lets go of Python's lock while it copies."""

    def gather(self, blocks: Sequence[BlockId], rows: Rows, slots: Sequence[Slot]) -> None:
        """Each block of the pool, all layers, into the row of the slot of the same index. Device memory: what was
        issued before the call is waited for, and the copies have ended when it returns."""

    def scatter(self, layers: range, rows: Rows, slots: Sequence[Slot], blocks: Sequence[BlockId]) -> None:
        """These layers of each slot's row into the block of the same index, which nobody else touches."""


@dataclass(frozen=True, slots=True)
class RestoreTiming:
    """What one restore moved from one tier, for the latency model."""

    tier: LowerTier
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Restored:
    """How a restore ended. The blocks before `good` hold what they should, verified; the others hold anything."""

    good: int
    digests: tuple[int, ...]
    """Of the good ones, as baton.digest has it; empty where blocks were stored compressed."""
    timings: tuple[RestoreTiming, ...] = ()
    reason: str = ""
    """Why not all are good: a sentence; empty if all are."""


class Restore(Protocol):
    """A run of blocks on its way up into blocks of the pool, layer by layer. For the engine's thread.

    It ends by itself: when everything has landed and was verified, when something failed, or by `cancel`. The
    engine's wake-up is called when a layer has landed and when it ends.
    """

    @property
    def layers(self) -> int:
        """So many of the lowest layers have landed, in all its blocks, not yet verified."""

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Blocks until that layer has landed or it has ended; whether the layer has landed."""

    @property
    def result(self) -> Restored | None:
        """None: not yet."""

    def wait(self, timeout_s: float) -> Restored | None:
        """Blocks until it has ended, so long at most."""

    def cancel(self) -> None:
        """Nothing is written into the blocks any more when this returns (a few ms); `result` is there. Idempotent."""

    @property
    def left_s(self) -> float:
        """How long the rest should take, by its own speed so far or what is known of the tiers."""


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier, for status and metrics."""

    tier: Tier
    blocks: int
    blocks_max: int
    size_bytes: int
    size_bytes_max: int
    retained_bytes: int = 0
    off_reason: str = ""
    """Not empty: turned off, and why."""
    stored_bytes: int = 0
    """That came down into it since the start."""
    stored_s: float = 0.0
    """That copying or writing it took."""
    arriving_bytes: int = 0
    """That are on their way down into it."""


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A prefix that is used again and again; `name` is its last block's."""

    name: BlockHash
    depth: int
    uses: int
    tier: Tier


class PoolView(Protocol):
    """What the tiers ask of the engine's pool."""

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""

    def upcoming(self, count: int) -> Sequence[tuple[BlockId, BlockHash]]:
        """Cached blocks in about the order in which they will be given away, at most so many. Changes nothing."""

    def hold(self, blocks: Sequence[BlockId]) -> None: ...

    def release(self, blocks: Sequence[BlockId], *, is_used: bool = True) -> None:
        """`is_used`: somebody had a use for what is in them, so they are evicted later."""


class LowerTiers(Protocol):
    """What the engine asks of the tiers below its pool. The engine's thread owns it; nothing of it waits for I/O but
    `flush`. It hears the pool, as a kvcache.block_pool.PoolListener, so it also knows what lies in HBM."""

    wake: Callable[[], None]
    """Called in any thread when there is something for `pump` or a restore has got on; the engine's owner sets it."""

    # ---- what the pool tells

    def stored(self, block: BlockId, name: BlockHash) -> None: ...

    def removed(self, block: BlockId, name: BlockHash) -> None:
        """Evicted; its content is still there until `flush` returns."""

    def flush(self) -> None:
        """What was removed is about to be overwritten: what of it is worth keeping, and is in no lower tier yet, is
        copied down now (a memcpy), or dropped where as much is on its way as may be."""

    # ---- what the engine tells

    def published(self, root: BlockHash, names: Sequence[BlockHash], first: int, owner: Owner) -> None:
        """The blocks `names[first:]` of a prompt are about to be published in the pool; the ones before were."""

    def used(self, names: Sequence[BlockHash], owner: Owner) -> None:
        """A request reuses this prefix, in whatever tiers its blocks lie; renews what its owner was promised."""

    def digested(self, names: Sequence[BlockHash], digests: Sequence[int]) -> None:
        """Of blocks in HBM, where the engine has come to know them."""

    def pump(self, pool: PoolView) -> None:
        """Once a step and after each wake-up: takes in what has ended, has blocks copied down that will be evicted
        soon, and moves on from DDR to SSD what DDR has no room for. Microseconds; starts work, waits for none."""

    # ---- what the engine asks

    def locate(self, names: Sequence[BlockHash]) -> Sequence[LowerTier]:
        """The longest run of `names`, from the first on, that the lower tiers have, by the tier that is quicker."""

    def restore(self, names: Sequence[BlockHash], blocks: Sequence[BlockId]) -> Restore:
        """Begins to copy these, all located in the same step, up into as many blocks of the pool, which are the
        caller's. Its slots stay as they are until it ends. A block that turns out corrupt is forgotten and counted."""

    def tier_of(self, name: BlockHash) -> Tier | None:
        """The highest tier that has it, HBM included."""

    def tenant_of(self, name: BlockHash) -> TenantTag | None:
        """Whose it is, in whatever tier it lies; None: nobody's that is known."""

    def changed(self) -> Sequence[BlockHash]:
        """Names whose `tier_of` may have changed since the last call, HBM included."""

    # ---- what operators and the cluster ask

    def note_copies(self, copies: Sequence[tuple[BlockHash, int]]) -> None:
        """How many other workers have these blocks, as the directory says: a last copy is kept longer."""

    def doubtful(self, count: int) -> Sequence[BlockHash]:
        """Blocks that may be dropped soon, and of whose other copies nothing new is known."""

    def pin(self, names: Sequence[BlockHash], until_s: float) -> None:
        """A peer is about to read these (monotonic seconds): they are not dropped before."""

    def clear(self, tenant: TenantTag | None) -> tuple[int, int]:
        """Forgets a tenant's blocks below HBM, or all, on the disk too; blocks and bytes."""

    def states(self) -> Sequence[TierState]:
        """Of the lower tiers."""

    def hottest(self, count: int) -> Sequence[HotPrefix]: ...

    @property
    def dropped_blocks(self) -> int: ...

    @property
    def corrupt_blocks(self) -> int: ...

    @property
    def is_settled(self) -> bool:
        """Nothing is on its way, up or down, and `pump` begins nothing more unless something happens."""

    def self_test(self) -> Sequence[RestoreTiming]:
        """Writes and reads a few MB in each tier, before serving."""

    def check_integrity(self) -> None: ...

    def close(self) -> None:
        """Ends the I/O threads. What lies on the SSD stays there."""
