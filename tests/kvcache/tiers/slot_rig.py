"""Blocks whose content follows from their names, and files of slots for them."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baton.digest import digests_of
from baton.ids import BlockHash, tenant_tag
from baton.layout import KVLayout
from kvcache.tiers.disk.disk_calls import DiskCalls
from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.disk.slot_format import HEADERS_OFFSET, FileStamp, file_stamp, slot_bytes
from kvcache.tiers.interface import Slot, SlotHeader
from kvcache.tiers.rows.host_memory import HostMemory

LAYOUT = KVLayout(layers=3, blocks=8, block_tokens=4, kv_heads=3, head_dim=8, dtype="float32")
PAYLOAD_BYTES = LAYOUT.block_bytes  # 2,304: not a whole page
STAMP = file_stamp("a model", LAYOUT, "none", PAYLOAD_BYTES)
OTHER_STAMP = file_stamp("another model", LAYOUT, "none", PAYLOAD_BYTES)


def file_bytes(slots: int, payload_bytes: int = PAYLOAD_BYTES) -> int:
    return HEADERS_OFFSET + slots * slot_bytes(payload_bytes)


def open_file(directory: Path, slots: int, *, stamp: FileStamp = STAMP, calls: DiskCalls | None = None) -> SlotFile:
    return SlotFile.open(directory, file_bytes(slots), stamp, PAYLOAD_BYTES, calls or DiskCalls())


@contextmanager
def opened(
    directory: Path, slots: int, *, stamp: FileStamp = STAMP, calls: DiskCalls | None = None
) -> Iterator[SlotFile]:
    with closing(open_file(directory, slots, stamp=stamp, calls=calls)) as file:
        yield file


def name_of(block: str) -> BlockHash:
    return BlockHash(sha256(block.encode()).digest()[:16])


def content_of(name: BlockHash) -> NDArray[np.uint8]:
    return np.random.default_rng(list(name)).integers(0, 256, PAYLOAD_BYTES, np.uint8)


def digest_of(row: NDArray[np.uint8]) -> int:
    """As the caller of a SlotFile has it."""
    slices = row[:PAYLOAD_BYTES].reshape(LAYOUT.layers, 2, 1, LAYOUT.slice_bytes)
    return digests_of(LAYOUT.layers, lambda layer, kv: slices[layer, kv])[0]


def header_of(name: BlockHash) -> SlotHeader:
    parent = BlockHash(name[::-1])
    return SlotHeader(name, parent, name[0], digest_of(content_of(name)), "none", tenant_tag("acme"), 1.5 * name[1])


def write_blocks(file: SlotFile, first: int, names: list[BlockHash]) -> None:
    """Into adjacent slots, in one call, from rows in another order."""
    memory = HostMemory(len(names), PAYLOAD_BYTES)
    row_slots = [Slot(row) for row in reversed(range(len(names)))]
    for row, name in zip(row_slots, names, strict=True):
        memory.rows[row] = content_of(name)
    file.write(slots_from(first, len(names)), [header_of(name) for name in names], memory.rows, row_slots)


def read_block(file: SlotFile, slot: int, name: BlockHash) -> tuple[SlotHeader | None, NDArray[np.uint8]]:
    rows = HostMemory(1, PAYLOAD_BYTES).rows
    return file.read([Slot(slot)], [name], rows, [Slot(0)])[0], rows[0]


def is_served(file: SlotFile, slot: int, name: BlockHash) -> bool:
    """Whether a caller that verifies takes what it reads there for the block; it must be the block then."""
    header, row = read_block(file, slot, name)
    if header is None or header.digest != digest_of(row):
        return False
    assert header == header_of(name)
    assert np.array_equal(row, content_of(name))
    return True


def scanned(file: SlotFile) -> dict[Slot, SlotHeader]:
    found: dict[Slot, SlotHeader] = {}
    file.scan(found.__setitem__, lambda: False)
    return found


def slots_from(first: int, count: int) -> list[Slot]:
    return [Slot(slot) for slot in range(first, first + count)]
