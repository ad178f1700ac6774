"""The frames of the nixl transport's control connection, and what an offer's descriptor says.

The blocks themselves go by NIXL: the receiver reads them out of the sender's region. The sender connects, and

    frame     = header body
    HELLO     : body = Hello: the ticket, the sender's nonce and its idea of the receiver's layout
    CHALLENGE : body = the receiver's nonce (32 bytes), its proof (32 bytes, kvtransfer/nixl/proof.py)
    SOURCE    : body = the sender's proof of all this and the rest of the body (32 bytes), Source: where to read
    WELCOME   : no body; the receiver can read there
    READY     : body = count source block ids, count target block ids (u32); `layer` is set: these slices may be read
    READ      : no body; the slices of one READY more have all been read: they lie in the receiver's region
    FENCE     : no body; answered by FENCED if the ticket is open still
    ERROR     : body = a Fault (u32), after which the receiver reads no more

From WELCOME on each frame but ERROR ends in a seal (16 bytes). All numbers are big-endian. A connection carries one
ticket.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from io import BytesIO
from typing import ClassVar

from baton.errors import TransferError
from kvtransfer.control import DIGEST_BYTES
from kvtransfer.nixl.agent import Source
from kvtransfer.nixl.proof import NONCE_BYTES
from kvtransfer.nixl.segment import Segment
from kvtransfer.region import pack_layout, unpack_layout

MAGIC = b"BNX1"
BODY_BYTES_MAX = 64 * 1024
READY_BLOCKS_MAX = 4096
"""In one READY."""
READY_MAX = 32
"""Sent and not yet read, of one connection."""


class Kind(IntEnum):
    HELLO = 1
    CHALLENGE = 2
    SOURCE = 3
    WELCOME = 4
    READY = 5
    READ = 6
    FENCE = 7
    FENCED = 8
    ERROR = 9


@dataclass(frozen=True, slots=True)
class Header:
    kind: int
    body_bytes: int
    layer: int = 0
    count: int = 0

    FORMAT: ClassVar[struct.Struct] = struct.Struct("!4sHHII")

    def pack(self) -> bytes:
        return self.FORMAT.pack(MAGIC, self.kind, self.layer, self.count, self.body_bytes)

    @classmethod
    def unpack(cls, data: bytes) -> "Header | None":
        """None if it is not a header of this version."""
        magic, kind, layer, count, body_bytes = cls.FORMAT.unpack(data)
        return cls(kind, body_bytes, layer, count) if magic == MAGIC and body_bytes <= BODY_BYTES_MAX else None


@dataclass(frozen=True, slots=True)
class Hello:
    ticket: int
    nonce: bytes
    layout_digest: bytes

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"!Q{NONCE_BYTES}s{DIGEST_BYTES}s")

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.ticket, self.nonce, self.layout_digest)

    @classmethod
    def unpack(cls, data: bytes) -> "Hello | None":
        return cls(*cls.FORMAT.unpack(data)) if len(data) == cls.FORMAT.size else None


_LENGTHS = struct.Struct("!II")


def pack_source(source: Source) -> bytes:
    layout, name = pack_layout(source.layout), source.name.encode()
    return _LENGTHS.pack(len(layout), len(name)) + layout + name + source.segment.pack() + source.metadata


def unpack_source(data: bytes) -> Source:
    """Raises TransferError for anything that `pack_source` did not make; into the metadata only NIXL looks."""
    stream = BytesIO(data)
    try:
        layout_bytes, name_bytes = _LENGTHS.unpack(stream.read(_LENGTHS.size))
        layout, name = unpack_layout(stream.read(layout_bytes)), stream.read(name_bytes).decode("ascii")
    except (struct.error, UnicodeDecodeError):
        raise TransferError("This is not a source that this version understands.") from None
    return Source(layout, Segment.unpack(stream.read(Segment.FORMAT.size), layout), name, stream.read())
