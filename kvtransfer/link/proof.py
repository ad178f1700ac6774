"""How two workers prove that they hold the cluster secret, and later that a ticket comes from the one that did.

Both prove with HMAC-SHA256 over the transcript: all that both said before, with a fresh nonce of each. So neither a
proof nor a session's key is good for another pair of workers, other layouts or another time. It does not keep out a man
in the middle who relays what both say and then reads or drops what follows: gRPC between workers is plain, and their
network trusted.
Without a secret (open mode) proofs are empty, and the link's random id is all that a ticket needs.
"""

import copy
import hashlib
import hmac
from enum import Enum

from baton.errors import Unauthorized, Unavailable
from baton.rpc import transfer_pb2, worker_pb2

REPLAY_WINDOW = 4096
"""Tickets that were signed one after another may arrive in another order, but not by more than so many."""
UNKNOWN_LINK = "This worker does not know the ticket's link, or no longer; make the link anew."
_DOMAIN = b"baton link v1"
SignedTicket = worker_pb2.Ticket | transfer_pb2.FetchTicket


class UnknownLink(Unavailable):
    """The sender was started anew, or the link broke and the receiver has not noticed yet."""

    def __init__(self) -> None:
        super().__init__(UNKNOWN_LINK)


class Purpose(Enum):
    """What an HMAC over a transcript is for; no two are interchangeable."""

    SENDER = b"sender"
    RECEIVER = b"receiver"
    KEY = b"key"


def transcript(hello: transfer_pb2.LinkHello, challenge: transfer_pb2.LinkChallenge) -> bytes:
    """All that both said before the proofs."""
    said = transfer_pb2.LinkChallenge()
    said.CopyFrom(challenge)
    said.ClearField("proof")
    parts = (hello.SerializeToString(deterministic=True), said.SerializeToString(deterministic=True))
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def prove(secret: bytes | None, purpose: Purpose, said: bytes) -> bytes:
    """Empty without a secret."""
    return b"" if secret is None else _hmac(secret, _DOMAIN + b"\0" + purpose.value + b"\0" + said)


def check_proof(secret: bytes | None, purpose: Purpose, said: bytes, proof: bytes) -> None:
    """Raises Unauthorized if the other side does not hold the same secret, or one side has none."""
    if hmac.compare_digest(prove(secret, purpose, said), proof):
        return
    if secret is None:
        raise Unauthorized("The other worker has a cluster secret and this one has none; give all workers the same.")
    raise Unauthorized("The other worker did not prove that it holds the cluster secret; give all workers the same.")


def session_key(secret: bytes | None, said: bytes) -> bytes | None:
    return None if secret is None else prove(secret, Purpose.KEY, said)


class TicketSigner:
    """The receiver's end of a link: signs tickets with the link's key."""

    def __init__(self, link_id: bytes, key: bytes | None) -> None:
        self._link_id, self._key = link_id, key
        self._number = 0

    def sign(self, ticket: SignedTicket) -> None:
        """Fills in `link`; nothing of the ticket may change afterwards."""
        self._number += 1
        ticket.link.CopyFrom(transfer_pb2.LinkProof(link_id=self._link_id, number=self._number))
        ticket.link.proof = _ticket_proof(self._key, ticket)


class TicketChecker:
    """The sender's end: takes each ticket once."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self._numbers = UsedNumbers()

    def check(self, ticket: SignedTicket) -> None:
        """Raises Unauthorized for a ticket that the link's receiver did not sign, or that came before."""
        if not hmac.compare_digest(_ticket_proof(self._key, ticket), ticket.link.proof):
            raise Unauthorized("The ticket was not signed with the key of its link.")
        if not self._numbers.take(ticket.link.number):
            raise Unauthorized("The ticket's number was used before.")


class UsedNumbers:
    """Which of the numbers from 1 on were taken: exactly, of the last REPLAY_WINDOW; all before count as taken."""

    def __init__(self) -> None:
        self._last = 0
        self._taken = 0
        """Bit i: whether `last - i` was."""

    def take(self, number: int) -> bool:
        """Whether this is the first time."""
        if number > self._last:
            shift = min(number - self._last, REPLAY_WINDOW)
            self._taken = (self._taken << shift | 1) & ((1 << REPLAY_WINDOW) - 1)
            self._last = number
            return True
        bit = 1 << (self._last - number) if self._last - number < REPLAY_WINDOW else 0
        if number < 1 or not bit or self._taken & bit:
            return False
        self._taken |= bit
        return True


def _ticket_proof(key: bytes | None, ticket: SignedTicket) -> bytes:
    """Over the whole ticket, its link and number included, but for the proof itself."""
    if key is None:
        return b""
    signed = copy.deepcopy(ticket)
    number = signed.link.number.to_bytes(8, "big")
    link_id = signed.link.link_id
    signed.ClearField("link")
    name = type(ticket).__name__.encode()
    return _hmac(
        key, b"\0".join((_DOMAIN, b"ticket", name, link_id + number + signed.SerializeToString(deterministic=True)))
    )


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()
