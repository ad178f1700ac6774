"""How both ends of a connection prove that they belong to the cluster and hold the ticket, without saying a secret.

The receiver's challenge makes each connection's proofs its own, the sender's nonce makes the receiver's answer fresh,
and the count, which only rises, makes each HELLO of a connection good for once.
"""

import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum

NONCE_BYTES = 16
PROOF_BYTES = 32


class Role(Enum):
    """Whose proof it is, so that none can be sent back to who made it."""

    SENDER = b"baton tcp sender"
    RECEIVER = b"baton tcp receiver"


def ticket_key(cluster_secret: bytes | None, ticket_secret: bytes) -> bytes:
    """What proofs are keyed with; without a cluster secret whoever holds the ticket can make it."""
    return hmac.digest(cluster_secret or b"", b"baton tcp ticket" + ticket_secret, hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a HELLO is about; both ends prove that they mean the same one."""

    challenge: bytes
    """The receiver's random number, NONCE_BYTES long; one for each connection."""
    nonce: bytes
    """The sender's, as long; one for each HELLO."""
    count: int
    ticket: int
    layout_digest: bytes

    def proof(self, role: Role, key: bytes) -> bytes:
        numbers = self.count.to_bytes(8, "big") + self.ticket.to_bytes(8, "big")
        said = role.value + b"\0" + self.challenge + self.nonce + numbers + self.layout_digest
        return hmac.digest(key, said, hashlib.sha256)

    def is_proven(self, proof: bytes, role: Role, key: bytes) -> bool:
        return hmac.compare_digest(proof, self.proof(role, key))
