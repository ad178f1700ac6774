"""Makes a worker's tiers from what its settings say."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from baton.layout import KVLayout
from kvcache.eviction.policy import make_policy
from kvcache.tiers.disk.disk_calls import DiskCalls
from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.disk.slot_format import file_stamp
from kvcache.tiers.interface import BlockCopier, StorageFormat
from kvcache.tiers.io.interface import PoolDigests, VerifyDdr
from kvcache.tiers.io.tier_io import TierIo
from kvcache.tiers.pages import whole_pages
from kvcache.tiers.rows.codec import codec_for
from kvcache.tiers.rows.host_memory import HostMemory
from kvcache.tiers.store import StoreShape, TierStore

log = logging.getLogger(__name__)
SMALLER: Final = 2
"""Host memory that cannot be had is asked for again, so many times smaller..."""
ATTEMPTS: Final = 4
"""...and so often."""


def open_tiers(
    *,
    layout: KVLayout,
    fingerprint: str,
    ddr_bytes: int,
    ssd_dir: Path | None,
    ssd_bytes: int,
    kv_compression: StorageFormat,
    bytes_in_flight_max: int,
    copier: BlockCopier,
    digests: PoolDigests,
    saved_s: Callable[[int], float],
    verify_ddr: VerifyDdr = "sampled",
    pin: Callable[[memoryview], None] | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    calls: DiskCalls = DiskCalls(),  # noqa: B008 - frozen
) -> TierStore | None:
    """Below a pool of this layout, whose blocks only equal workers (`fingerprint`: of the model) can use.

    `copier`, `digests` and `pin` are called in any thread. `saved_s`: what not computing the block at this depth again
    saves. None: there is no room for one block in host memory, or none was asked for. Raises SettingsError where the
    SSD's directory cannot be used.
    """
    codec = codec_for(kv_compression, layout)
    row_bytes = codec.stored_bytes if codec else layout.block_bytes
    memory = host_memory(ddr_bytes, row_bytes, pin)
    if memory is None:
        return None
    file = None
    if ssd_dir is not None:
        stamp = file_stamp(fingerprint, layout, kv_compression, row_bytes)
        file = SlotFile.open(ssd_dir, ssd_bytes, stamp, row_bytes, calls)
    bytes_max = max(bytes_in_flight_max, layout.block_bytes)
    slots = file.slots if file else 0
    shape = StoreShape(
        hbm_blocks=layout.blocks,
        ddr_slots=memory.slots,
        ssd_slots=slots,
        block_bytes=layout.block_bytes,
        row_bytes=row_bytes,
        storage=kv_compression,
        bytes_in_flight_max=bytes_max,
    )

    def close(has_ended: bool) -> None:
        """What a stuck thread may still touch goes with the process."""
        if has_ended:
            memory.close()
            if file is not None:
                file.close()

    def start(wake: Callable[[], None]) -> TierIo:
        return TierIo(
            copier, memory, file, codec, digests, layout, bytes_max, wake, clock, verify_ddr=verify_ddr, pin=pin
        )

    policy = make_policy(layout.blocks + memory.slots + slots)
    random = np.random.default_rng(seed)
    return TierStore(shape, start, policy, saved_s, random, clock=clock, wall_clock=wall_clock, on_close=close)


def host_memory(size_bytes: int, row_bytes: int, pin: Callable[[memoryview], None] | None) -> HostMemory | None:
    """Rows of so many bytes in all, or less where there is not so much to be had: a smaller cache is better than no
    worker. None: not for one row."""
    for attempt in range(ATTEMPTS):
        slots = size_bytes // whole_pages(row_bytes) // SMALLER**attempt
        if not slots:
            break
        try:
            return HostMemory(slots, row_bytes, pin)
        except (OSError, MemoryError) as error:
            log.warning("%d bytes of host memory for KV could not be had: %s", slots * whole_pages(row_bytes), error)
    if size_bytes:
        log.warning("There are no cache tiers: ddr_bytes has no room for a KV block of %d bytes", row_bytes)
    return None
