"""Fetches named blocks from another worker into blocks that were reserved for them."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from baton.clock import Clock, monotonic
from baton.errors import BatonError, DeadlineExceeded, TransferError
from baton.ids import BlockHash, BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2, transfer_pb2_grpc
from baton.rpc.convert import layout_to_proto
from kvtransfer.fetch.receiving import Receiving
from kvtransfer.interface import Offer
from kvtransfer.landing import Landing
from kvtransfer.link.client import Link, Links
from kvtransfer.link.proof import UnknownLink
from kvtransfer.registry import Ports
from kvtransfer.verify import Verifier

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
"""How long a sender may take to answer a cancel."""
SETTLE_TIMEOUT_S = 5.0
"""How long nobody may be sure that nothing lands any more before the caller is told so."""


class FetchCancelled(BatonError):
    """The caller took the ticket back."""


class NoLink(BatonError):
    """There is none to the sender; it is being made, if that is possible."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a fetch ended. Of the blocks that were reserved the first `blocks` hold what they should, verified; the
    others hold anything."""

    digests: tuple[int, ...]
    """Of each block that was fetched; zeros where the sender makes none."""
    error: BatonError | None
    """Why the rest did not come: NoLink, Unavailable, TransferError, DeadlineExceeded or FetchCancelled. None: the
    sender has no more of them."""
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    """As the sender measured them, when it sent all that it has."""
    settling: "asyncio.Task[None] | None" = None
    """Somebody may still write into the reserved blocks until this ends, so nothing was fetched and they must not be
    used for anything until then."""

    @property
    def blocks(self) -> int:
        return len(self.digests)


class Fetcher:
    """The receiver's side, one worker's, on its loop."""

    def __init__(
        self,
        links: Links,
        ports: Ports,
        channel: Callable[[str], Awaitable[grpc.aio.Channel]],
        verifier: Verifier,
        fingerprint: str,
        layout: KVLayout,
        clock: Clock = monotonic,
    ) -> None:
        """`fingerprint` and `layout` are this worker's."""
        self._links, self._ports, self._channel, self._verifier = links, ports, channel, verifier
        self._fingerprint, self._layout, self._clock = fingerprint, layout, clock
        self._numbers = itertools.count()
        self._settling: set[asyncio.Task[None]] = set()

    def is_linked(self, address: str) -> bool:
        """Whether a fetch from there can begin."""
        return self._links.present(address) is not None

    def begin_link(self, address: str) -> None:
        """Has the link made, which may take longer than what is to be fetched would take to compute."""
        self._links.begin(address)

    async def fetch(
        self,
        address: str,
        request_id: RequestId,
        names: Sequence[BlockHash],
        blocks: Sequence[BlockId],
        deadline_s: float,
        cancelled: asyncio.Event,
        landing: Landing | None = None,
    ) -> Fetched:
        """The longest run of `names` that the worker at this gRPC address has, into as many of `blocks`, which are the
        caller's. Waits for no link: where there is none, one is begun. Ends within `deadline_s` from now, and
        RELEASE_TIMEOUT_S and SETTLE_TIMEOUT_S after it or after `cancelled`; a task that fetches is not to be
        cancelled, but for the worker's end. In `landing`, which has heard of nothing yet, it can be seen how far it
        has come."""
        assert len(names) == len(blocks) > 0
        landing = landing or Landing(len(blocks))
        fetch = _Fetch(request_id, names, blocks, self._clock() + deadline_s, cancelled)
        if cancelled.is_set():
            return Fetched((), FetchCancelled("The fetch was taken back before it began."))
        link = self._links.present(address)
        if link is None:
            self._links.begin(address)
            return Fetched((), NoLink("There is no link to the worker that has the blocks."))
        try:
            return await self._fetch_by(link, fetch, landing)
        except UnknownLink as error:
            self._links.drop(address, link)
            self._links.begin(address)
            return Fetched((), NoLink(str(error)))
        except BatonError as error:
            return Fetched((), error)

    async def close(self) -> None:
        """Waits for nothing any more: the region goes with the worker. Idempotent."""
        for settling in tuple(self._settling):
            settling.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)

    async def _fetch_by(self, link: Link, fetch: "_Fetch", landing: Landing) -> Fetched:
        """Raises UnknownLink if nothing came for that reason alone."""
        # A ticket of its own for each fetch: whether a request's earlier one is settled is another question.
        ticket_id = RequestId(f"{fetch.request_id}/fetch-{next(self._numbers)}")
        sent, error = transfer_pb2.FetchDone(), None
        try:
            offer = self._ports.open(link.transport, ticket_id, fetch.blocks)
            sent = await self._receive(link, self._ticket(ticket_id, offer, fetch), landing, fetch)
        except BatonError as failure:
            error = failure
        finally:
            settling = await self._shut(ticket_id)
        if settling is not None:
            return Fetched((), TransferError("The writer of a fetched block is still at it."), settling=settling)
        if isinstance(error, UnknownLink):
            raise error
        return Fetched(landing.digests, error, sent.transfer_bytes, sent.transfer_s)

    def _ticket(self, ticket_id: RequestId, offer: Offer, fetch: "_Fetch") -> transfer_pb2.FetchTicket:
        return transfer_pb2.FetchTicket(
            request_id=ticket_id,
            names=fetch.names,
            blocks=fetch.blocks,
            layout=layout_to_proto(self._layout),
            fingerprint=self._fingerprint,
            offers=[transfer_pb2.TransportOffer(transport=offer.transport, descriptor=offer.descriptor)],
            deadline_s=max(fetch.until_s - self._clock(), 0.0) + RELEASE_TIMEOUT_S,
        )

    async def _receive(
        self, link: Link, ticket: transfer_pb2.FetchTicket, landing: Landing, fetch: "_Fetch"
    ) -> transfer_pb2.FetchDone:
        """Raises BatonError; what landed and was found right by then counts."""
        channel = await self._channel(link.address)
        link.sign(ticket)
        call = transfer_pb2_grpc.TransferStub(channel).Fetch()
        receiving = Receiving(call, ticket, landing, self._verifier)
        await self._run(receiving, fetch)
        return receiving.sent

    async def _run(self, receiving: Receiving, fetch: "_Fetch") -> None:
        """Returns when it has ended by itself; raises what it does. Raises FetchCancelled or DeadlineExceeded where it
        was ended: by taking the ticket back, and if that is not answered by force."""
        running = asyncio.ensure_future(receiving.run())
        taken_back = asyncio.ensure_future(fetch.cancelled.wait())
        leaving: asyncio.Future[None] | None = None
        left_s = max(fetch.until_s - self._clock(), 0.0)
        try:
            await asyncio.wait({running, taken_back}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            leaving = asyncio.ensure_future(receiving.take_back())
            await asyncio.wait({running}, timeout=RELEASE_TIMEOUT_S)
        finally:
            receiving.close()
            await _cancel(running, taken_back, leaving)
        if fetch.cancelled.is_set():
            raise FetchCancelled("The fetch was taken back.")
        raise DeadlineExceeded("The fetch was not done within its deadline.")

    async def _shut(self, ticket_id: RequestId) -> "asyncio.Task[None] | None":
        """Closes the ticket. None: nothing can land under it any more."""
        self._ports.close_ticket(ticket_id)
        settling = asyncio.create_task(self._ports.settle(ticket_id))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        await asyncio.wait({settling}, timeout=SETTLE_TIMEOUT_S)
        if not settling.done():
            return settling
        settling.result()
        return None


@dataclass(frozen=True, slots=True)
class _Fetch:
    request_id: RequestId
    names: Sequence[BlockHash]
    blocks: Sequence[BlockId]
    until_s: float
    cancelled: asyncio.Event


async def _cancel(*tasks: "asyncio.Future[Any] | None") -> None:
    """Returns when they have ended, in whatever way."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)
