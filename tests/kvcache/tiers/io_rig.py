"""A pool, an arena of DDR and a file that misbehaves as told, with real I/O threads between them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import numpy as np

from baton.digest import block_digests
from baton.ids import BlockHash, BlockId, TenantTag
from baton.layout import KVLayout
from kvcache.tiers.interface import LowerTier, Rows, Slot, SlotHeader, StorageFormat
from kvcache.tiers.io.interface import IoSizes, RestorePart, VerifyDdr
from kvcache.tiers.io.tier_io import TierIo
from kvcache.tiers.rows.codec import Codec, codec_for
from kvcache.tiers.rows.copier import HostCopier
from kvcache.tiers.rows.host_memory import HostMemory

LAYOUT = KVLayout(layers=4, blocks=66, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")
BLOCK_BYTES = LAYOUT.block_bytes
SMALL = IoSizes(
    piece_bytes=3 * BLOCK_BYTES, group_bytes=2 * BLOCK_BYTES, staging_bytes=3 * BLOCK_BYTES
)  # many pieces, even of a few blocks
WAIT_S = 20.0
POISON = 0xEE


class FakeFile:
    """Implements SlotIo in memory. By turns of `faults` a call goes well or not."""

    def __init__(self, faults: Callable[[], str] = lambda: "") -> None:
        """`faults` says of each call: "" goes well, "fail", "flip" a bit of what is read, "slow", "hang" until
        `release`."""
        self.slots: dict[Slot, tuple[SlotHeader, bytes]] = {}
        self.faults = faults
        self.calls: list[str] = []
        self.at_once_max = 0
        self._at_once = 0
        self._released = threading.Event()
        self.hangs = threading.Event()

    def read(
        self,
        slots: Sequence[Slot],
        names: Sequence[BlockHash],
        rows: Rows,
        row_slots: Sequence[Slot],
        size_bytes: int | None = None,
    ) -> list[SlotHeader | None]:
        with self._call("read") as fault:
            headers = []
            for slot, name, row in zip(slots, names, row_slots, strict=True):
                header, payload = self.slots.get(slot, (None, b""))
                rows[row, : len(payload[:size_bytes])] = np.frombuffer(payload[:size_bytes], np.uint8)
                headers.append(header if header is not None and header.name == name else None)
            if fault == "flip":
                rows[row_slots[0], 7] ^= 16
            return headers

    def read_on(self, slots: Sequence[Slot], rows: Rows, row_slots: Sequence[Slot], part: range) -> None:
        with self._call("read on") as fault:
            for slot, row in zip(slots, row_slots, strict=True):
                rows[row, part.start : part.stop] = np.frombuffer(self.slots[slot][1][part.start : part.stop], np.uint8)
            if fault == "flip":
                rows[row_slots[0], part.start + 7] ^= 16

    def write(
        self, slots: Sequence[Slot], headers: Sequence[SlotHeader], rows: Rows, row_slots: Sequence[Slot]
    ) -> None:
        with self._call("write"):
            for slot, header, row in zip(slots, headers, row_slots, strict=True):
                self.slots[slot] = (header, rows[row].tobytes())

    def erase(self, slots: Sequence[Slot]) -> None:
        with self._call("erase"):
            for slot in slots:
                self.slots.pop(slot, None)

    def scan(self, found: Callable[[Slot, SlotHeader], None], is_stopped: Callable[[], bool]) -> None:
        for slot, (header, _) in sorted(self.slots.items()):
            if is_stopped():
                return
            found(slot, header)

    def release(self) -> None:
        """What hangs, and will hang, goes on."""
        self._released.set()

    @contextmanager
    def _call(self, name: str) -> Iterator[str]:
        self.calls.append(name)
        self._at_once += 1
        self.at_once_max = max(self.at_once_max, self._at_once)
        try:
            fault = self.faults()
            if fault == "slow":
                time.sleep(0.0002)
            if fault == "hang":
                self.hangs.set()
                assert self._released.wait(2 * WAIT_S)
            if fault == "fail":
                raise OSError(5, "Input/output error")
            yield fault
        finally:
            self._at_once -= 1


@dataclass(slots=True)
class Rig:
    """Block i of the content is called `names[i]`; at first it lies in block i of the pool."""

    io: TierIo
    pool: Rows
    """[block][byte], as rows below HBM: a copy, see `blocks`."""
    ddr: HostMemory
    file: FakeFile
    memory: memoryview
    names: list[BlockHash]
    digests: list[int]
    codec: Codec | None
    wakes: list[int] = field(default_factory=list)

    def content(self, index: int) -> bytes:
        """What the block of that name holds."""
        return self.pool[index].tobytes()

    def block(self, block: int) -> bytes:
        """What lies in the pool now."""
        row = np.zeros((1, BLOCK_BYTES), np.uint8)
        HostCopier(self.memory, LAYOUT).gather([BlockId(block)], row, [Slot(0)])
        return row[0].tobytes()

    def poison(self, blocks: Sequence[int]) -> None:
        rows = np.full((len(blocks), BLOCK_BYTES), POISON, np.uint8)
        ids = [BlockId(block) for block in blocks]
        HostCopier(self.memory, LAYOUT).scatter(range(LAYOUT.layers), rows, [Slot(i) for i in range(len(ids))], ids)

    def is_poisoned(self, block: int) -> bool:
        return self.block(block) == bytes([POISON]) * BLOCK_BYTES

    def header(self, index: int, digest: int | None = None, storage: StorageFormat = "none") -> SlotHeader:
        digest = self.digests[index] if digest is None else digest
        return SlotHeader(self.names[index], self.names[0], index, digest, storage, TenantTag(bytes(8)))

    def fill(self, indices: Sequence[int]) -> None:
        """Slot i of DDR and of the file get block i, stored as it is."""
        slots = [Slot(index) for index in indices]
        self.io.offload_now([BlockId(index) for index in indices], slots, [self.digests[i] for i in indices])
        for index, slot in zip(indices, slots, strict=True):
            self.file.slots[slot] = (self.header(index), self.ddr.rows[slot].tobytes())

    def part(self, tier: LowerTier, index: int, block: int, storage: StorageFormat = "none") -> RestorePart:
        return RestorePart(tier, Slot(index), self.names[index], self.digests[index], storage, BlockId(block))


@contextmanager
def rig_of(
    seed: int = 0,
    *,
    faults: Callable[[], str] = lambda: "",
    sizes: IoSizes = SMALL,
    verify_ddr: VerifyDdr = "always",
    bytes_max: int = 16 * BLOCK_BYTES,
    compression: StorageFormat = "none",
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Rig]:
    floats = np.random.default_rng(seed).standard_normal(LAYOUT.region_bytes // 4).astype(np.float32)
    memory = memoryview(bytearray(floats.tobytes()))
    copier = HostCopier(memory, LAYOUT)
    pool = np.zeros((LAYOUT.blocks, BLOCK_BYTES), np.uint8)
    everything = [BlockId(block) for block in range(LAYOUT.blocks)]
    copier.gather(everything, pool, [Slot(block) for block in everything])
    codec = codec_for(compression, LAYOUT)
    ddr = HostMemory(LAYOUT.blocks, codec.stored_bytes if codec else BLOCK_BYTES)
    file = FakeFile(faults)
    names = [BlockHash(Random(f"{seed} {block}").randbytes(16)) for block in everything]
    wakes: list[int] = []
    io = TierIo(
        copier,
        ddr,
        file,
        codec,
        lambda blocks, layers: block_digests(memory, LAYOUT, blocks, layers),
        LAYOUT,
        bytes_max,
        lambda: wakes.append(1),
        clock,
        verify_ddr,
        sizes=sizes,
    )
    rig = Rig(io, pool, ddr, file, memory, names, block_digests(memory, LAYOUT, everything), codec, wakes)
    try:
        yield rig
    finally:
        file.release()
        assert io.close()
        ddr.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("kv-io", "kv-scan"))]
