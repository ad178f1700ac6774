"""NIXL itself: one agent, its registered region, and reads out of others' regions."""

import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.interface import Region
from kvtransfer.nixl.package import failures, library
from kvtransfer.nixl.segment import Segment, segment_of

_LOCAL = "NIXL_INIT_AGENT"


@dataclass(frozen=True, slots=True)
class Source:
    """A region that can be read. Whoever knows it can read the region, so only who has proven itself is told."""

    layout: KVLayout
    segment: Segment
    name: str
    """The agent's, drawn at random: so no two live ones are called alike."""
    metadata: bytes = field(repr=False)


@dataclass(slots=True, eq=False)
class Peer:
    """Another worker, whose region can be read here."""

    source: Source
    slices: Any
    """A prepared list of all slices of its region."""
    users: int = 0
    is_broken: bool = False


class Agent:
    """Everything on one thread: NIXL's agents are not to be shared between threads, and progress only when asked to.

    Raises TransferError whatever NIXL raises.
    """

    def __init__(self, region: Region) -> None:
        api = library()
        segment = segment_of(region)
        try:
            name = f"baton-{secrets.token_hex(8)}"
            config = api.nixl_agent_config(enable_prog_thread=False)  # it would take a whole core, idle or not
            self._nixl = api.nixl_agent(name, config)
            place = [(segment.address, segment.size_bytes, segment.device, "")]
            self._registered = self._nixl.register_memory(place, segment.mem_type)
            self._slices = self._prepare(_LOCAL, segment, region.layout)
            self.source = Source(region.layout, segment, name, self._nixl.get_agent_metadata())
            self._peers: set[Peer] = set()
        except failures() as error:
            raise TransferError(f"NIXL cannot use this worker's KV region: {error}.") from None

    def add(self, source: Source) -> Peer:
        """One that is known by this name must have been removed: NIXL loses sight of its reads under way."""
        try:
            name = _text(self._nixl.add_remote_agent(source.metadata))
            if name != source.name:
                raise TransferError("The sender's NIXL agent has another name than it said.")
            peer = Peer(source, self._prepare(name, source.segment, source.layout))
        except failures() as error:
            raise TransferError(f"NIXL cannot reach the sender's region: {error}.") from None
        self._peers.add(peer)
        return peer

    def remove(self, peer: Peer) -> None:
        """When no read of its region is under way: one that is would be lost sight of, and land at any time."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        slices, peer.slices = peer.slices, None
        try:
            slices.release()
            self._nixl.remove_remote_agent(peer.source.name)
        except failures():
            pass  # it is gone already

    def post(self, peer: Peer, local: NDArray[np.int32], remote: NDArray[np.int32]) -> Any:
        """Begins to read slices of the peer's region into as many of this one; on one machine it is done on return."""
        try:
            handle = self._nixl.make_prepped_xfer("READ", self._slices, local, peer.slices, remote)
        except failures() as error:
            raise TransferError(_lost(error)) from None
        try:
            self._nixl.transfer(handle)
        except failures() as error:
            handle.release()
            raise TransferError(_lost(error)) from None
        return handle

    def is_done(self, handle: Any) -> bool:
        """Raises TransferError for a read that failed. After either of these ends nothing lands any more, and the
        handle is released; before it must not be: NIXL lets go of reads under way without stopping them."""
        try:
            state = self._nixl.check_xfer_state(handle)
        except library().nixlBind.nixlNotFoundError:
            return False  # somebody took the peer's name: NIXL has lost sight of it, so it may land at any time
        except failures() as error:
            handle.release()
            raise TransferError(_lost(error)) from None
        if state == "PROC":
            return False
        handle.release()
        if state != "DONE":
            raise TransferError(_lost(state))
        return True

    def progress(self) -> None:
        """What others read here, and connections to them, may need this."""
        self._nixl.get_new_notifs()

    def close(self) -> None:
        """Nothing lands afterwards, whatever was under way, once its handles are gone too."""
        for peer in tuple(self._peers):
            self.remove(peer)
        self._slices.release()
        self._nixl.deregister_memory(self._registered)
        del self._nixl, self._slices, self._registered

    def _prepare(self, name: str, segment: Segment, layout: KVLayout) -> Any:
        return self._nixl.prep_xfer_dlist(name, segment.slices(layout), segment.mem_type)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _lost(error: object) -> str:
    return f"The sender's region could not be read: {error}."
