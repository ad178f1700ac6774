"""How fast blocks come up by themselves: from DDR and the SSD into a pool, by the I/O threads, without an engine."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
from rich import box
from rich.table import Table

from baton.digest import block_digests
from baton.ids import BlockHash, BlockId, TenantTag
from baton.layout import PROBE_BLOCKS, KVLayout
from bench.models import Shape
from bench.tiers.figures import Rate
from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.disk.slot_format import file_stamp, slot_bytes
from kvcache.tiers.interface import LowerTier, Slot, SlotHeader, StorageFormat
from kvcache.tiers.io.interface import IoSizes, RestorePart, VerifyDdr
from kvcache.tiers.io.tier_io import TierIo
from kvcache.tiers.rows.codec import codec_for
from kvcache.tiers.rows.copier import HostCopier
from kvcache.tiers.rows.host_memory import HostMemory

WAIT_S = 60.0
RUNS = 9
BLOCK_TOKENS = 32
LARGE = KVLayout(layers=32, blocks=42, block_tokens=32, kv_heads=8, head_dim=128, dtype="bfloat16")
"""Blocks of 4 MiB, of a model with 8 B parameters."""


@dataclass(frozen=True, slots=True)
class Case:
    tier: LowerTier
    verify_ddr: VerifyDdr = "sampled"
    """The default of a worker."""
    sizes: IoSizes = IoSizes()  # noqa: RUF009 - frozen


CASES = (Case("ddr", "never"), Case("ddr"), Case("ddr", "always"), Case("ssd"))
WHOLE_CASE = Case("ssd", sizes=IoSizes(read_bytes=2**62))
"""No rows are read in parts, whatever their size."""


@dataclass(frozen=True, slots=True)
class RestoreSpeed:
    """Medians of some runs."""

    gb_per_s: float
    """Of KV in the pool, verified."""
    first_layer_s: float
    """From the call until the lowest layer has landed."""
    whole_s: float


@dataclass(slots=True)
class RestoreRig:
    """A pool full of random blocks, each of which also lies in DDR and, in order, on the SSD."""

    layout: KVLayout
    io: TierIo
    names: Sequence[BlockHash]
    digests: Sequence[int]
    """As stored."""
    storage: StorageFormat
    order: Random

    def restore(self, tier: LowerTier, count: int) -> tuple[float, float]:
        """Of `count` blocks, each into another's place; the slots adjacent, the places anywhere. How long until the
        first layer and until all had landed and was verified."""
        places = self.order.sample(range(len(self.names)), count)
        parts = [
            RestorePart(tier, Slot(slot), self.names[slot], self.digests[slot], self.storage, BlockId(place))
            for slot, place in enumerate(places)
        ]
        begin_s = time.perf_counter()
        job = self.io.restore(parts)
        assert job.wait_layer(0, WAIT_S)
        first_s = time.perf_counter() - begin_s
        result = job.wait(WAIT_S)
        assert result is not None and result.good == count, result
        return first_s, time.perf_counter() - begin_s


@contextmanager
def restore_rig(layout: KVLayout, directory: Path, case: Case, storage: StorageFormat = "none") -> Iterator[RestoreRig]:
    """Makes a file in the directory, and takes it away again."""
    blocks = layout.pool_blocks
    pool = np.random.default_rng(0).standard_normal(layout.region_bytes // 4, np.float32).data.cast("B")
    codec = codec_for(storage, layout)
    row_bytes = codec.stored_bytes if codec else layout.block_bytes
    ddr = HostMemory(blocks, row_bytes)
    stamp = file_stamp(f"bench-{os.getpid()}", layout, storage, row_bytes)
    file = SlotFile.open(directory, (blocks + 1) * slot_bytes(row_bytes), stamp, row_bytes)

    def digests(some: Sequence[BlockId], layers: range) -> list[int]:
        return block_digests(pool, layout, some, layers)

    wake = threading.Event().set
    copier = HostCopier(pool, layout)
    io = TierIo(
        copier,
        ddr,
        file,
        codec,
        digests,
        layout,
        layout.region_bytes,
        wake,
        verify_ddr=case.verify_ddr,
        sizes=case.sizes,
    )
    try:
        names = [BlockHash(block.to_bytes(16, "little")) for block in range(blocks)]
        yield RestoreRig(layout, io, names, _stored(io, names, storage), storage, Random(0))
    finally:
        io.close()
        ddr.close()
        file.close()
        file.path.unlink()


def _stored(io: TierIo, names: Sequence[BlockHash], storage: StorageFormat) -> list[int]:
    """Copies every block of the pool down into DDR, and on to the SSD; its digests as stored."""
    slots = [Slot(slot) for slot in range(len(names))]
    down = io.offload([BlockId(slot) for slot in slots], slots, [None] * len(slots))
    assert down.wait(WAIT_S) and down.error is None, down.error
    digests = [digest for digest in down.result if digest is not None]
    tenant = TenantTag(bytes(8))
    headers = [
        SlotHeader(name, names[0], at, digest, storage, tenant)
        for at, (name, digest) in enumerate(zip(names, digests, strict=True))
    ]
    written = io.demote(slots, slots, headers)
    assert written.wait(WAIT_S) and written.error is None, written.error
    return digests


def measure(
    layout: KVLayout, directory: Path, case: Case, storage: StorageFormat = "none", runs: int = RUNS
) -> RestoreSpeed:
    """Of four in five blocks of the pool at a time; the first run does not count."""
    count = layout.pool_blocks * 4 // 5
    with restore_rig(layout, directory, case, storage) as rig:
        times = [rig.restore(case.tier, count) for _ in range(runs + 1)][1:]
    first_s, whole_s = (median(column) for column in zip(*times, strict=True))
    return RestoreSpeed(count * layout.block_bytes / whole_s / 1e9, first_s, whole_s)


def restore_rates(shape: Shape, directory: Path, size_bytes: int, compression: StorageFormat) -> list[Rate]:
    """Of a worker's blocks, with its defaults; from DDR with every block verified, too."""
    layout = pool_of(shape, size_bytes)
    cases = Case("ddr"), Case("ddr", "always"), Case("ssd")
    return [Rate(case.tier, measure(layout, directory, case, compression).gb_per_s, case.verify_ddr) for case in cases]


def pool_of(shape: Shape, size_bytes: int) -> KVLayout:
    """A quarter more than what is restored at a time, and the probe blocks."""
    one = KVLayout(shape.layers, 1, BLOCK_TOKENS, shape.kv_heads, shape.hidden // shape.heads, shape.dtype)
    blocks = -(-size_bytes // one.block_bytes)
    return replace(one, blocks=blocks + blocks // 4 + PROBE_BLOCKS)


def restore_table(shape: Shape, directory: Path, size_bytes: int, compression: StorageFormat) -> Table:
    """Of a worker's blocks and of large ones, with the first layer."""
    made = Table(title="restores", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("from", "blocks, KiB", "verified", "GB/s", "first layer, ms", "all, ms"):
        made.add_column(heading, justify="left" if heading in ("from", "verified") else "right")
    for layout in (pool_of(shape, size_bytes), LARGE):
        for case in CASES if layout is not LARGE else (*CASES, WHOLE_CASE):
            speed = measure(layout, directory, case, compression)
            name = case.tier if case is not WHOLE_CASE else f"{case.tier}, whole rows"
            times = (f"{seconds * 1e3:.2f}" for seconds in (speed.first_layer_s, speed.whole_s))
            made.add_row(name, f"{layout.block_bytes // 1024:,}", case.verify_ddr, f"{speed.gb_per_s:.2f}", *times)
    return made
