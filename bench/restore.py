"""How fast restores alone are: blocks from DDR and from the SSD into a pool, by the I/O threads, without an engine.

`python -m bench.restore DIRECTORY [--json]` prints GB/s, beside one memcpy of as many bytes and
the sequential read of the same disk in the same run.
"""

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from baton.digest import block_digests
from baton.ids import BlockHash, BlockId, TenantTag
from baton.layout import KVLayout
from bench.tiers.raw import disk_read_gb_per_s, memcpy_gb_per_s
from kvcache.tiers.codec import codec_for
from kvcache.tiers.copier import HostCopier
from kvcache.tiers.host_memory import HostMemory
from kvcache.tiers.interface import LowerTier, Slot, SlotHeader, StorageFormat
from kvcache.tiers.io_interface import RestorePart, VerifyDdr
from kvcache.tiers.slot_file import SlotFile
from kvcache.tiers.slot_format import file_stamp, slot_bytes
from kvcache.tiers.tier_io import TierIo

WAIT_S = 60.0
LAYOUT = KVLayout(layers=8, blocks=600, block_tokens=16, kv_heads=4, head_dim=64, dtype="float32")
"""Of the model of the tiers' benchmark."""


@dataclass(frozen=True, slots=True)
class RestoreSpeed:
    source: str
    """ddr or ssd, and how much of DDR's is verified."""
    gb_per_s: float
    first_layer_s: float
    """From the call until the lowest layer has landed."""


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
def restore_rig(
    layout: KVLayout, directory: Path, verify_ddr: VerifyDdr, storage: StorageFormat = "none"
) -> Iterator[RestoreRig]:
    """Makes a file in the directory, and takes it away again."""
    blocks = layout.pool_blocks
    numbers = np.random.default_rng(0).standard_normal(layout.region_bytes // 4, np.float32)
    pool = numbers.data.cast("B")
    codec = codec_for(storage, layout)
    row_bytes = codec.stored_bytes if codec else layout.block_bytes
    ddr = HostMemory(blocks, row_bytes)
    stamp = file_stamp(f"bench-{os.getpid()}", layout, storage, row_bytes)
    file = SlotFile.open(directory, (blocks + 1) * slot_bytes(row_bytes), stamp, row_bytes)
    ended = threading.Event()
    io = TierIo(
        HostCopier(pool, layout),
        ddr,
        file,
        codec,
        lambda some: block_digests(pool, layout, some),
        layout,
        layout.region_bytes,
        ended.set,
        verify_ddr=verify_ddr,
    )
    try:
        names = [BlockHash(block.to_bytes(16, "little")) for block in range(blocks)]
        slots = [Slot(slot) for slot in range(blocks)]
        down = io.offload([BlockId(slot) for slot in slots], slots, [None] * blocks)
        assert down.wait(WAIT_S) and down.error is None
        digests = [digest for digest in down.result if digest is not None]
        tenant = TenantTag(bytes(8))
        headers = [
            SlotHeader(name, names[0], at, digest, storage, tenant)
            for at, (name, digest) in enumerate(zip(names, digests, strict=True))
        ]
        written = io.demote(slots, slots, headers)
        assert written.wait(WAIT_S) and written.error is None, written.error
        yield RestoreRig(layout, io, names, digests, storage, Random(0))
    finally:
        io.close()
        ddr.close()
        file.close()
        file.path.unlink()


def measure_restores(
    layout: KVLayout, count: int, directory: Path, storage: StorageFormat = "none", runs: int = 9
) -> list[RestoreSpeed]:
    """GB/s of KV in the pool; the medians of some runs each."""
    speeds = []
    cases: list[tuple[LowerTier, VerifyDdr]] = [
        ("ddr", "never"),
        ("ddr", "sampled"),
        ("ddr", "always"),
        ("ssd", "never"),
    ]
    for tier, verify in cases:
        with restore_rig(layout, directory, verify, storage) as rig:
            times = [rig.restore(tier, count) for _ in range(runs)]
        first_s, whole_s = (statistics.median(column) for column in zip(*times, strict=True))
        source = tier if tier == "ssd" else f"{tier}, verified {verify}"
        speeds.append(RestoreSpeed(source, count * layout.block_bytes / whole_s / 1e9, first_s))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--storage", choices=["none", "int8"], default="none")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    size_bytes = arguments.blocks * LAYOUT.block_bytes
    memcpy, (disk, _) = memcpy_gb_per_s(size_bytes), disk_read_gb_per_s(arguments.directory, size_bytes)
    speeds = measure_restores(LAYOUT, arguments.blocks, arguments.directory, arguments.storage)
    if arguments.json:
        restores = [{"source": s.source, "gb_per_s": s.gb_per_s, "first_layer_s": s.first_layer_s} for s in speeds]
        print(json.dumps({"memcpy_gb_per_s": memcpy, "disk_read_gb_per_s": disk, "restore": restores}))
        return
    print(f"one memcpy                 {memcpy:6.2f} GB/s")
    print(f"sequential read            {disk:6.2f} GB/s")
    for speed in speeds:
        print(f"{speed.source:26} {speed.gb_per_s:6.2f} GB/s, first layer {speed.first_layer_s * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
