"""The frames of the tcp transport, and what an offer's descriptor says.

    frame   = header body
    HELLO   : body = secret (16 bytes), digest of the sender's idea of the receiver's layout (16 bytes)
    SLICES  : body = count target block ids (u32), count key slices, count value slices; `layer` is set
    FENCE   : no body; answered by an ACK once everything before it lies in the region
    ACK     : no body; the receiver's answer to HELLO and FENCE, with their count
    ERROR   : no body; count is a Fault, after which the receiver takes no more for the ticket

All numbers are big-endian. A connection carries one ticket at a time: a HELLO begins the next.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.region import pack_layout
from kvtransfer.tickets import SECRET_BYTES

TRANSPORT = "tcp"
_MAGIC = b"BKV1"
DIGEST_BYTES = 16
HELLO_BYTES = SECRET_BYTES + DIGEST_BYTES


class Kind(IntEnum):
    HELLO = 1
    SLICES = 2
    FENCE = 3
    ACK = 4
    ERROR = 5


class Fault(IntEnum):
    """Why the receiver takes no more."""

    MALFORMED = 1
    UNAUTHORIZED = 2
    TICKET_CLOSED = 3
    BLOCK_OUTSIDE = 4
    LAYOUT = 5

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Fault.MALFORMED: "The receiver could not understand what was sent.",
    Fault.UNAUTHORIZED: "The receiver knows no open ticket with that secret.",
    Fault.TICKET_CLOSED: "The receiver has closed the ticket.",
    Fault.BLOCK_OUTSIDE: "A target block is not part of the ticket.",
    Fault.LAYOUT: "The region of the peer has another layout than it said.",
}


@dataclass(frozen=True, slots=True)
class Header:
    kind: int
    ticket: int
    layer: int = 0
    count: int = 0

    FORMAT: ClassVar[struct.Struct] = struct.Struct("!4sHHIQ")

    def pack(self) -> bytes:
        return self.FORMAT.pack(_MAGIC, self.kind, self.layer, self.count, self.ticket)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "Header | None":
        """None if it is not a header of this version."""
        magic, kind, layer, count, ticket = cls.FORMAT.unpack(data)
        return cls(kind, ticket, layer, count) if magic == _MAGIC else None


def layout_digest(layout: KVLayout) -> bytes:
    return hashlib.sha256(pack_layout(layout)).digest()[:DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Address:
    """An offer's descriptor: where the receiver listens, and the ticket's number and secret."""

    host: str
    port: int
    ticket: int
    secret: bytes = field(repr=False)

    FORMAT: ClassVar[struct.Struct] = struct.Struct("!HQ16s")

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.port, self.ticket, self.secret) + self.host.encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Address":
        """Raises TransferError for anything that `pack` did not make."""
        try:
            port, ticket, secret = cls.FORMAT.unpack(data[: cls.FORMAT.size])
            return cls(data[cls.FORMAT.size :].decode(), port, ticket, secret)
        except (struct.error, UnicodeDecodeError):
            raise TransferError("The offer is not one that this version understands.") from None
