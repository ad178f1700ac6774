"""The frames of the ucx transport's control connection, and what an offer's descriptor says.

Control frames go over a TCP connection: who may write, which blocks come next, that they have landed, and the end of
either side. The slices themselves are UCX messages, numbered from 1 in the order in which the SLICES frames name them.

    frame     = header body
    CHALLENGE : the receiver's nonce (16 bytes); the first frame of a connection
    HELLO     : Hello, then the sender's UCX worker address with the first one of a connection
    WELCOME   : Welcome, then the receiver's UCX worker address with the first one. Message 0 then tries the way
    SLICES    : Runs of target blocks; one message for each run's keys, then one for each run's values; `layer` is set
    FENCE     : count (u64); answered by an ACK with that count once everything before it lies in the region
    ACK       : count (u64), 0 for message 0
    ERROR     : a Fault (u16), after which the receiver takes no more and closes the connection

All numbers are big-endian. A connection carries one ticket at a time: a HELLO begins the next.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

from baton.errors import TransferError
from kvtransfer.control import DIGEST_BYTES
from kvtransfer.tcp.proof import NONCE_BYTES, PROOF_BYTES

TRANSPORT = "ucx"
_MAGIC = b"BUX1"
BODY_BYTES_MAX = 8192
_NUMBER_BITS = 24
TRIAL_BYTES = 8
"""Of message 0."""


class Kind(IntEnum):
    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    SLICES = 4
    FENCE = 5
    ACK = 6
    ERROR = 7


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    body: bytes = b""
    layer: int = 0

    HEADER: ClassVar[struct.Struct] = struct.Struct("!4sHHI")

    def pack(self) -> bytes:
        assert len(self.body) <= BODY_BYTES_MAX
        return self.HEADER.pack(_MAGIC, self.kind, self.layer, len(self.body)) + self.body

    @classmethod
    def read(cls, data: bytearray) -> "Frame | None":
        """Takes a whole frame off the front; None if there is none yet. Raises TransferError if none can follow."""
        if len(data) < cls.HEADER.size:
            return None
        magic, kind, layer, body_bytes = cls.HEADER.unpack(data[: cls.HEADER.size])
        if magic != _MAGIC or body_bytes > BODY_BYTES_MAX:
            raise TransferError("This is not a frame of this version.")
        end = cls.HEADER.size + body_bytes
        if len(data) < end:
            return None
        body = bytes(data[cls.HEADER.size : end])
        del data[:end]
        return cls(kind, body, layer)


@dataclass(frozen=True, slots=True)
class Hello:
    count: int
    """Higher than that of the HELLO before."""
    ticket: int
    nonce: bytes
    layout_digest: bytes
    """Of the sender's idea of the receiver's layout."""
    proof: bytes = field(repr=False)
    address: bytes = b""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"!QQ{NONCE_BYTES}s{DIGEST_BYTES}s{PROOF_BYTES}s")

    def pack(self) -> bytes:
        fixed = self.FORMAT.pack(self.count, self.ticket, self.nonce, self.layout_digest, self.proof)
        return fixed + self.address

    @classmethod
    def unpack(cls, body: bytes) -> "Hello":
        """Raises struct.error if it is too short."""
        count, ticket, nonce, digest, proof = cls.FORMAT.unpack_from(body)
        return cls(count, ticket, nonce, digest, proof, body[cls.FORMAT.size :])


@dataclass(frozen=True, slots=True)
class Welcome:
    count: int
    """The HELLO's."""
    tags: int = field(repr=False)
    """The tag of message 0: random, so that nobody else can send what a message's place waits for."""
    proof: bytes = field(repr=False)
    address: bytes = b""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"!QQ{PROOF_BYTES}s")

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.count, self.tags, self.proof) + self.address

    @classmethod
    def unpack(cls, body: bytes) -> "Welcome":
        """Raises struct.error if it is too short."""
        count, tags, proof = cls.FORMAT.unpack_from(body)
        return cls(count, tags, proof, body[cls.FORMAT.size :])

    @property
    def said(self) -> bytes:
        """What the receiver proves besides what the HELLO said."""
        return self.tags.to_bytes(8, "big") + self.address


@dataclass(frozen=True, slots=True)
class TargetRun:
    """Adjacent target blocks."""

    first: int
    blocks: int


_RUN = struct.Struct("!II")
RUNS_MAX = BODY_BYTES_MAX // _RUN.size
"""In one frame."""
COUNT = struct.Struct("!Q")
FAULT = struct.Struct("!H")


def pack_runs(runs: Sequence[TargetRun]) -> bytes:
    return b"".join(_RUN.pack(run.first, run.blocks) for run in runs)


def unpack_runs(body: bytes) -> list[TargetRun]:
    """Raises struct.error unless it is whole runs."""
    return [TargetRun(first, blocks) for first, blocks in _RUN.iter_unpack(body)]


def tag_of(tags: int, number: int) -> int:
    """Numbers begin anew after 2^24; far fewer are ever under way."""
    low = (1 << _NUMBER_BITS) - 1
    return (tags & ~low) | (number & low)
