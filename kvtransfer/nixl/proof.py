"""How both ends of a control connection prove that they belong to the cluster and hold the ticket.

Neither a secret nor a key is ever sent. Both nonces are in all that is made here, so nothing of it is good for another
connection; each frame's seal has a number, so none can be left out, doubled or moved. What is said stays readable for
who can read the network, as are the blocks themselves: a network that RDMA runs on is trusted not to listen.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from enum import Enum

NONCE_BYTES = 32
PROOF_BYTES = 32
SEAL_BYTES = 16


class Role(Enum):
    """Whose it is, so that none can be sent back to who made it."""

    SENDER = b"baton nixl sender"
    RECEIVER = b"baton nixl receiver"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What both ends have said to each other before they prove anything."""

    hello: bytes
    challenge: bytes
    """The receiver's nonce."""
    key: bytes = field(repr=False)

    def proof(self, role: Role, said: bytes = b"") -> bytes:
        return _hmac(self.key, role.value, self.hello, self.challenge, said)

    def is_proven(self, proof: bytes, role: Role, said: bytes = b"") -> bool:
        return hmac.compare_digest(proof, self.proof(role, said))

    def sealer(self, role: Role) -> "Sealer":
        """For the frames that this role sends."""
        return Sealer(_hmac(self.key, b"baton nixl seal", role.value, self.hello, self.challenge))


class Sealer:
    """Makes the seals of one direction's frames, one after the other."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def seal(self, frame: bytes) -> bytes:
        self._number += 1
        return hmac.digest(self._key, self._number.to_bytes(8, "big") + frame, hashlib.sha256)[:SEAL_BYTES]


def draw_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def ticket_key(cluster_secret: bytes | None, ticket_secret: bytes) -> bytes:
    """What proofs are keyed with; without a cluster secret whoever holds the ticket can make it."""
    return _hmac(cluster_secret or b"", b"baton nixl ticket", ticket_secret)


def _hmac(key: bytes, *parts: bytes) -> bytes:
    said = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.digest(key, said, hashlib.sha256)
