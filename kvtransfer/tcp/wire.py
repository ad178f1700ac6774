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

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

from kvtransfer.control import DIGEST_BYTES
from kvtransfer.tcp.proof import NONCE_BYTES, PROOF_BYTES

TRANSPORT = "tcp"
_MAGIC = b"BKV2"


class Kind(IntEnum):
    HELLO = 1
    SLICES = 2
    FENCE = 3
    ACK = 4
    ERROR = 5
    CHALLENGE = 6
    WELCOME = 7


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
