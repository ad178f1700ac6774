"""What the transports with a control connection (tcp, ucx, nixl) say alike on it and in their offers."""

import hashlib
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.region import pack_layout

DIGEST_BYTES = 16


class Fault(IntEnum):
    """Why the receiver takes no more."""

    MALFORMED = 1
    UNAUTHORIZED = 2
    TICKET_CLOSED = 3
    BLOCK_OUTSIDE = 4
    LAYOUT = 5
    UNREACHABLE = 6
    UNREADABLE = 7

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Fault.MALFORMED: "The receiver could not understand what was sent.",
    Fault.UNAUTHORIZED: "The receiver knows no open ticket with that secret, or has another cluster secret.",
    Fault.TICKET_CLOSED: "The receiver has closed the ticket.",
    Fault.BLOCK_OUTSIDE: "A target block is not part of the ticket.",
    Fault.LAYOUT: "The region of the peer has another layout than it said.",
    Fault.UNREACHABLE: "The receiver's UCX has no way to this one.",
    Fault.UNREADABLE: "The receiver could not read this worker's region.",
}


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
