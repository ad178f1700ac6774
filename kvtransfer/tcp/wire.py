"""The frames of the tcp transport, and what an offer's descriptor says.

    frame     = header body
    CHALLENGE : body = the receiver's nonce (16 bytes); the first frame of a connection
    HELLO     : body = the sender's nonce (16 bytes), digest of its idea of the receiver's layout (16 bytes),
                its proof (32 bytes, kvtransfer/tcp/proof.py); count is higher than that of the HELLO before
    WELCOME   : body = the receiver's proof (32 bytes); its answer to HELLO, with its count
    SLICES    : body = count target block ids (u32), count key slices, count value slices; `layer` is set
    FENCE     : no body; answered by an ACK once everything before it lies in the region
    ACK       : no body; the receiver's answer to FENCE, with its count
    ERROR     : no body; count is a Fault, after which the receiver takes no more for the ticket

All numbers are big-endian. A connection carries one ticket at a time: a HELLO begins the next. Proofs say who writes;
that nobody in the middle changes what is written, only TLS says.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.region import pack_layout
from kvtransfer.tcp.proof import NONCE_BYTES, PROOF_BYTES

TRANSPORT = "tcp"
_MAGIC = b"BKV2"
DIGEST_BYTES = 16


class Kind(IntEnum):
    HELLO = 1
    SLICES = 2
    FENCE = 3
    ACK = 4
    ERROR = 5
    CHALLENGE = 6
    WELCOME = 7


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
    Fault.UNAUTHORIZED: "The receiver knows no open ticket with that secret, or has another cluster secret.",
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


@dataclass(frozen=True, slots=True)
class Hello:
    """A HELLO's body."""

    nonce: bytes
    layout_digest: bytes
    proof: bytes = field(repr=False)

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"!{NONCE_BYTES}s{DIGEST_BYTES}s{PROOF_BYTES}s")

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.nonce, self.layout_digest, self.proof)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "Hello":
        return cls(*cls.FORMAT.unpack(data))


def layout_digest(layout: KVLayout) -> bytes:
    return hashlib.sha256(pack_layout(layout)).digest()[:DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Address:
    """An offer's descriptor: where the receiver listens and whether by TLS, the ticket's number and secret."""

    host: str
    port: int
    ticket: int
    secret: bytes = field(repr=False)
    is_tls: bool = False

    FORMAT: ClassVar[struct.Struct] = struct.Struct("!?HQ16s")

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.is_tls, self.port, self.ticket, self.secret) + self.host.encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Address":
        """Raises TransferError for anything that `pack` did not make."""
        try:
            is_tls, port, ticket, secret = cls.FORMAT.unpack(data[: cls.FORMAT.size])
            return cls(data[cls.FORMAT.size :].decode(), port, ticket, secret, is_tls)
        except (struct.error, UnicodeDecodeError):
            raise TransferError("The offer is not one that this version understands.") from None
