"""What stands in a slot file beside the KV itself: two superblocks at its start, and a header page before each payload.

    [superblock][its mirror] ([header page][payload, filled up to whole pages]) × slots

Numbers are little-endian. Whatever is not, to the last bit, what `pack_*` made reads as None.
"""

import json
import math
import struct
import zlib
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NewType

from baton.ids import BlockHash, TenantTag
from baton.layout import KVLayout
from kvcache.tiers.interface import SlotHeader, StorageFormat
from kvcache.tiers.pages import PAGE_BYTES, whole_pages

FORMAT_VERSION = 1
SUPERBLOCKS = 2
"""Mirrors, written one after the other: whichever of the two writes a crash tears, the other copy is whole."""
HEADERS_OFFSET = SUPERBLOCKS * PAGE_BYTES

FileStamp = NewType("FileStamp", bytes)
"""32 bytes; two files with one stamp hold slots of the same kind."""

_SUPERBLOCK = struct.Struct("<8sIQQQ32s")
_SUPERBLOCK_MAGIC = b"KVSLOTS\n"
_HEADER = struct.Struct("<4sBIQ16s16s16sQ8sdQ")
_HEADER_MAGIC = b"KVB\n"
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
"""So many bytes of the page are the header; the others are zero and mean nothing."""
_STAMP_PREFIX_BYTES = 16
_CODES: dict[StorageFormat, int] = {"none": 0, "int8": 1}
_STORAGE = {code: storage for storage, code in _CODES.items()}


def file_stamp(fingerprint: str, layout: KVLayout, storage: StorageFormat, payload_bytes: int) -> FileStamp:
    """Of everything that decides whether the bytes of one file's slots mean in another worker what they mean here."""
    fields: list[str | int] = [FORMAT_VERSION, fingerprint, layout.layers, layout.block_tokens, layout.kv_heads]
    fields += [layout.head_dim, layout.dtype, storage, payload_bytes]
    return FileStamp(sha256(json.dumps(fields).encode()).digest())


def slot_bytes(payload_bytes: int) -> int:
    """From one slot of a file to the next."""
    return PAGE_BYTES + whole_pages(payload_bytes)


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a file says of itself."""

    stamp: FileStamp
    slots: int
    payload_bytes: int
    generation: int
    """Slots of any other generation are empty: a new one empties the file in one write."""

    @property
    def file_bytes(self) -> int:
        return HEADERS_OFFSET + self.slots * slot_bytes(self.payload_bytes)


def pack_superblock(superblock: Superblock) -> bytes:
    """One page."""
    fields = (superblock.generation, superblock.slots, superblock.payload_bytes, superblock.stamp)
    return _page(_SUPERBLOCK.pack(_SUPERBLOCK_MAGIC, FORMAT_VERSION, *fields))


def unpack_superblock(page: bytes) -> Superblock | None:
    fields = _fields(_SUPERBLOCK, page)
    if fields is None or fields[:2] != (_SUPERBLOCK_MAGIC, FORMAT_VERSION):
        return None
    _, _, generation, slots, payload_bytes, stamp = fields
    return Superblock(FileStamp(stamp), slots, payload_bytes, generation) if slots and payload_bytes else None


@dataclass(frozen=True, slots=True)
class HeaderFormat:
    """The header pages of one file in one generation."""

    superblock: Superblock

    def pack(self, header: SlotHeader) -> bytes:
        """One page."""
        own = self.superblock
        fields = _HEADER.pack(
            *(_HEADER_MAGIC, _CODES[header.storage], header.depth, own.generation, own.stamp[:_STAMP_PREFIX_BYTES]),
            *(header.name, header.parent, header.digest, header.tenant, header.keep_until, own.payload_bytes),
        )
        return _page(fields)

    def unpack(self, page: bytes) -> SlotHeader | None:
        """Of a page or its first HEADER_BYTES. None: empty, torn, of another kind of file or an older generation."""
        fields = _fields(_HEADER, page)
        if fields is None:
            return None
        magic, code, depth, generation, stamp, name, parent, digest, tenant, keep_until, payload_bytes = fields
        own = self.superblock
        is_ours = (magic, generation, payload_bytes) == (_HEADER_MAGIC, own.generation, own.payload_bytes)
        if not is_ours or stamp != own.stamp[:_STAMP_PREFIX_BYTES] or code not in _STORAGE or math.isnan(keep_until):
            return None
        names = BlockHash(name), BlockHash(parent)
        return SlotHeader(*names, depth, digest, _STORAGE[code], TenantTag(tenant), keep_until)


def _page(fields: bytes) -> bytes:
    return (fields + _CHECKSUM.pack(zlib.crc32(fields))).ljust(PAGE_BYTES, b"\0")


def _fields(form: struct.Struct, page: bytes) -> tuple[Any, ...] | None:
    """What `_page` was given, by its form; None if the checksum says that it is not that."""
    if len(page) < form.size + _CHECKSUM.size:
        return None
    (checksum,) = _CHECKSUM.unpack_from(page, form.size)
    return form.unpack_from(page) if zlib.crc32(page[: form.size]) == checksum else None
