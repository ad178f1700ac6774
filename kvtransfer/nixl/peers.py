"""Workers whose regions can be read here, each known once however many tickets it serves."""

import asyncio

from baton.errors import TransferError
from kvtransfer.nixl.agent import Agent, Peer, Source
from kvtransfer.nixl.driver import Driver

IDLE_S = 30.0
"""How long a peer stays known after its last ticket: the first read of a new one is slower by some milliseconds."""


class Peers:
    """Their number is bounded by the connections there are and were within `idle_s`."""

    def __init__(self, driver: Driver, idle_s: float = IDLE_S) -> None:
        self._driver, self._idle_s = driver, idle_s
        self._peers: dict[str, Peer] = {}
        """By the agent's name."""
        self._expiries: dict[Peer, asyncio.TimerHandle] = {}
        self._adding = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._peers)

    async def acquire(self, source: Source) -> Peer:
        """To be released as often as acquired. Raises TransferError where NIXL does not reach it."""
        async with self._adding:
            peer = self._peers.get(source.name) or await self._add(source)
        if peer.source != source:
            raise TransferError("The sender's region is not what it said before.")
        if peer.is_broken:
            raise TransferError("The connection to the sender is broken; it is made anew when its last read has ended.")
        self.use(peer)
        return peer

    async def _add(self, source: Source) -> Peer:
        peer = await self._driver.call(lambda agent: agent.add(source))
        self._peers[source.name] = peer
        self._expire_later(peer)
        return peer

    def use(self, peer: Peer) -> None:
        """One user more, to be released as well."""
        peer.users += 1
        if expiry := self._expiries.pop(peer, None):
            expiry.cancel()

    def release(self, peer: Peer) -> None:
        peer.users -= 1
        if peer.users == 0 and self._peers.get(peer.source.name) is peer:
            if peer.is_broken:
                self._drop(peer)
            else:
                self._expire_later(peer)

    def _expire_later(self, peer: Peer) -> None:
        self._expiries[peer] = asyncio.get_running_loop().call_later(self._idle_s, self._drop, peer)

    def _drop(self, peer: Peer) -> None:
        self._expiries.pop(peer, None)
        del self._peers[peer.source.name]
        self._driver.submit(lambda agent: _remove(agent, peer))

    def close(self) -> None:
        """The agent is closed after this, and with it all that it knows."""
        for expiry in self._expiries.values():
            expiry.cancel()
        self._expiries.clear()
        self._peers.clear()


def _remove(agent: Agent, peer: Peer) -> None:
    agent.remove(peer)
