"""Decode workers whose memory is mapped here."""

import asyncio
from dataclasses import dataclass, field

from baton.errors import TransferError
from kvtransfer.memory import AttachedMemory
from kvtransfer.region import AttachedRegion, attach
from kvtransfer.shm.table import Invitation, holds

IDLE_S = 600.0
"""How long a peer stays mapped after its last ticket: mapping it anew costs a page fault for each page."""
LOOK_S = 10.0
"""How often an idle peer is looked after: a dead one's memory is held here for so long at most."""


@dataclass(slots=True, eq=False)
class Peer:
    """One decode worker's region and ticket table."""

    key: bytes = field(repr=False)
    region: AttachedRegion
    table: AttachedMemory
    users: int = 0
    claimed: set[int] = field(default_factory=set)
    """Tickets that a connection of this process has: the fence's lock is one for the whole process."""
    expiry: asyncio.TimerHandle | None = None

    @property
    def is_alive(self) -> bool:
        return self.region.owner.is_alive

    def check_alive(self) -> None:
        if not self.is_alive:
            raise TransferError("The receiver's process is gone.")

    def check_open(self, invitation: Invitation) -> None:
        if not holds(self.table.memory, invitation.slot, invitation.secret):
            raise TransferError("The receiver has closed the ticket.")

    def claim(self, ticket: int) -> None:
        """Raises TransferError if another connection of this process has the ticket."""
        if ticket in self.claimed:
            raise TransferError("Another connection has this ticket.")
        self.claimed.add(ticket)

    def disclaim(self, ticket: int) -> None:
        self.claimed.discard(ticket)

    def close(self) -> None:
        if self.expiry is not None:
            self.expiry.cancel()
        self.region.close()
        self.table.close()


class Peers:
    """Maps each peer once. Their number is bounded by the receivers that gave tickets within `idle_s`."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._peers: dict[bytes, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def acquire(self, invitation: Invitation) -> Peer:
        """To be released as often as acquired. Raises TransferError where the memory cannot be mapped."""
        key = invitation.region + invitation.table.pack()
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = _map(key, invitation)
        if peer.expiry is not None:
            peer.expiry.cancel()
            peer.expiry = None
        peer.users += 1
        return peer

    def release(self, peer: Peer) -> None:
        """With its last user a dead peer is unmapped at once, so that nothing holds its memory; others later."""
        peer.users -= 1
        if peer.users == 0:
            self._look(peer, self._idle_s)

    def _look(self, peer: Peer, left_s: float) -> None:
        if left_s <= 0 or not peer.is_alive:
            self._drop(peer)
        else:
            pause_s = min(left_s, LOOK_S)
            peer.expiry = asyncio.get_running_loop().call_later(pause_s, self._look, peer, left_s - pause_s)

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.key]
        peer.close()

    def close(self) -> None:
        """After all were released."""
        for peer in tuple(self._peers.values()):
            self._drop(peer)


def _map(key: bytes, invitation: Invitation) -> Peer:
    region = attach(invitation.region)
    try:
        return Peer(key, region, AttachedMemory.attach(invitation.table))
    except TransferError:
        region.close()
        raise
