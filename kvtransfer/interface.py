"""The transport protocol: two roles, two Protocols.

The decode worker *receives*: for each request it opens a ticket on the blocks it reserved and gives
the ticket's offers to the prefill worker. The prefill worker *sends*: it takes the best offer it can
serve, writes slices into the ticket's blocks and fences. All methods run on the worker's asyncio loop
and never block it: copies and socket I/O of more than a few hundred KB happen elsewhere or in pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.ids import BlockId, RequestId
from baton.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to reach a ticket's blocks; the descriptor is the transport's own encoding and holds a
    secret, so it is never logged."""

    transport: str
    descriptor: bytes = field(repr=False)


class Source(Protocol):
    """KV as those see it who read it. See baton.layout.KVLayout for what lies where."""

    layout: KVLayout

    @property
    def is_host(self) -> bool:
        """Host memory: views are the region itself, so taking them costs nothing and may be done on the
        loop. For other memory `readable` may wait for the device, so it is called in a thread."""

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        """Bytes of `blocks` adjacent slices. Host memory: a view of the region itself. Device memory:
        a host copy, taken after the writes that were issued before the call."""

    def digests(self, blocks: Sequence[BlockId]) -> Sequence[int]:
        """The 64-bit digest (baton/digest.py) of each block, all layers, as it lies now. May take a while and be
        called in any thread; for device memory it is computed there."""


class Region(Source, Protocol):
    """A worker's KV memory as transports see it."""

    def writable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        """Host memory to fill with `blocks` adjacent slices; then call `written` with the same arguments and it.
        Several may be out at one time, for different blocks; one whose ticket closes meanwhile, or whose
        link breaks, is dropped without `written`."""

    def written(self, layer: int, kv: int, first_block: int, blocks: int, view: memoryview) -> None:
        """The view from `writable` is filled. Host memory: nothing to do. Device memory: copies it in;
        called on the loop with a few MB at most."""

    def share(self) -> bytes | None:
        """How another process of this user maps the region (kvtransfer/region.py), or None where it
        cannot."""

    def close(self) -> None: ...


REPEATS_MAX = 64
"""One write may name a block several times, as a link's self-test does: so many blocks in all, or as many as the ticket
has if that is more."""


class Connection(Protocol):
    """One ticket's way into the decode worker's region, used by one task at a time (`close` may be
    called by another). Raises TransferError when the peer, the link or the ticket is gone; after an
    error or a cancellation only `close` may follow."""

    transport: str
    bytes_written: int
    busy_s: float
    """Time spent in write and fence."""

    def read_from(self, source: Source) -> None:
        """Before the first write: source blocks are those of `source`, which has the peer's layout, and not the
        worker's own. Raises TransferError where the transport reads nothing but the worker's region (Port.converts)."""

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        """Copies the key and the value slice of each source block, in one layer, to the target block
        of the same index. Returns when there is room for the next: the source must stay as it is until a fence or
        `close` has returned. Cancelled, it ends when the source is no longer read."""

    async def fence(self) -> None:
        """Returns when everything written so far lies in the peer's region."""

    async def close(self) -> None:
        """Idempotent; after it returns this side reads and writes nothing any more. What was written
        without a fence may have landed or not, and what a socket still carries lands until the receiver
        closes the ticket."""


class TransportSender(Protocol):
    """The sending side of one transport."""

    transport: str

    async def connect(self, offer: Offer, layout: KVLayout) -> Connection:
        """`layout` is the peer's. Raises TransferError with the reason if this offer does not work from here."""

    async def close(self) -> None:
        """Closes its connections too."""


class Receiver(Protocol):
    """The receiving side of one transport."""

    async def start(self) -> None:
        """Called once, before `open`. Raises TransferError if it cannot, such as for a port that is taken."""

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        """Lets whoever holds an offer write into `blocks`, and nothing else, until `close_ticket`; an
        earlier ticket of the same request is closed. None, where the region cannot be reached this way now."""

    def close_ticket(self, request_id: RequestId) -> None:
        """Withdraws the offers. What this process itself moves lands no more; a one-sided writer (shm) sees it
        before its next copy, but may still be in one until `settle`. Unknown ids are ignored."""

    async def settle(self, request_id: RequestId) -> None:
        """After `close_ticket`: returns once no byte can land any more under any ticket that this request had, whoever
        writes: the fence before its blocks may be somebody else's. At once where nothing was under way; as long as a
        writer is stopped in the middle of a copy, so callers bound it and keep the blocks. Unknown ids are settled."""

    async def close(self) -> None: ...
