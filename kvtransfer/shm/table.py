"""The table of open tickets, in shared memory beside the region, that a writer consults before each copy.

So closing a ticket takes effect at once in every process, but for a copy that is under way: see fence.py.
"""

import struct
from dataclasses import dataclass, field

from baton.errors import TransferError
from baton.ids import BlockId
from kvtransfer.memory import Share
from kvtransfer.tickets import SECRET_BYTES

TRANSPORT = "shm"
TICKETS_MAX = 16384
"""Open at one time; past it a ticket is not offered by shm."""
TABLE_BYTES = TICKETS_MAX * SECRET_BYTES
"""A slot holds the secret of an open ticket, or zeros. One that is used again is no danger to a late writer: it
compares the whole secret."""
_NUMBERS = struct.Struct("!QII")
_NUMBER_MAX = 2**62
"""Locks are on signed 64-bit offsets."""


def put(table: memoryview, slot: int, secret: bytes) -> None:
    table[slot * SECRET_BYTES : (slot + 1) * SECRET_BYTES] = secret


def holds(table: memoryview, slot: int, secret: bytes) -> bool:
    return table[slot * SECRET_BYTES : (slot + 1) * SECRET_BYTES] == secret


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an offer's descriptor says."""

    table: Share
    ticket: int
    """Its number: no other of this table has or gets it."""
    slot: int
    secret: bytes = field(repr=False)
    blocks: tuple[BlockId, ...]
    region: bytes = field(repr=False)

    def pack(self) -> bytes:
        head = self.table.pack() + self.secret + _NUMBERS.pack(self.ticket, self.slot, len(self.blocks))
        return head + struct.pack(f"!{len(self.blocks)}I", *self.blocks) + self.region

    @classmethod
    def unpack(cls, data: bytes) -> "Invitation":
        """Raises TransferError for anything that `pack` did not make."""
        table, data = data[: Share.FORMAT.size], data[Share.FORMAT.size :]
        secret, data = data[:SECRET_BYTES], data[SECRET_BYTES:]
        try:
            ticket, slot, count = _NUMBERS.unpack_from(data)
            blocks = struct.unpack_from(f"!{count}I", data, _NUMBERS.size)
        except struct.error:
            raise TransferError("The offer is not one that this version understands.") from None
        share = Share.unpack(table)
        if share.size != TABLE_BYTES or slot >= TICKETS_MAX or ticket > _NUMBER_MAX:
            raise TransferError("The offer's ticket table is not one that this version understands.")
        return cls(share, ticket, slot, secret, tuple(map(BlockId, blocks)), data[_NUMBERS.size + 4 * count :])
