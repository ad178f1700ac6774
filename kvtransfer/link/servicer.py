"""The links that this worker sends by: who its receivers are, and which tickets are theirs."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio

from baton.clock import Clock, monotonic
from baton.errors import BatonError, DeadlineExceeded, Overloaded
from baton.ids import RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2
from kvtransfer.interface import Connection, Offer
from kvtransfer.link.conversation import LINK_TIMEOUT_S, Conversation
from kvtransfer.link.expectation import Expectations
from kvtransfer.link.failures import failure_kind, link_status
from kvtransfer.link.identity import LinkIdentity
from kvtransfer.link.metrics import LinkMetrics, OpenLink
from kvtransfer.link.proof import SignedTicket, TicketChecker, UnknownLink
from kvtransfer.link.sender import Chosen, Guest, LinkSender
from kvtransfer.registry import Ports

log = logging.getLogger(__name__)

LINKS_MAX = 1024
HANDSHAKES_MAX = 128
"""At one time."""
LINK_ID_BYTES = 16
LinkContext: TypeAlias = "grpc.aio.ServicerContext[transfer_pb2.LinkRequest, transfer_pb2.LinkResponse]"


@dataclass(frozen=True, slots=True)
class PeerLink:
    """One receiver, proved and tested."""

    worker_id: str
    transport: str
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class _Entry:
    peer: PeerLink
    checker: TicketChecker


def _ignore(size_bytes: int, seconds: float) -> None:
    del size_bytes, seconds


class LinkBook:
    """The sender's side. A link is in the book from right before its receiver is told until its stream ends."""

    def __init__(
        self,
        ports: Ports,
        me: LinkIdentity,
        secret: bytes | None,
        makes_digests: bool,
        metrics: LinkMetrics,
        clock: Clock = monotonic,
        on_measured: Callable[[int, float], None] = _ignore,
        expectations: Expectations | None = None,
    ) -> None:
        self._ports, self._me, self._metrics = ports, me, metrics
        self._sender = LinkSender(ports, me, secret, makes_digests, metrics, clock)
        self._on_measured, self._expectations = on_measured, expectations or Expectations()
        self._links: dict[bytes, _Entry] = {}
        self._handshakes = 0

    def __len__(self) -> int:
        return len(self._links)

    # ---- tickets

    def check(self, ticket: SignedTicket) -> PeerLink:
        """Whose ticket it is; each is good once. Raises UnknownLink, which is Unavailable, if its link is not of this
        process, Unauthorized if the link's receiver did not sign it or it was used before."""
        entry = self._links.get(ticket.link.link_id)
        if entry is None:
            raise UnknownLink
        entry.checker.check(ticket)
        return entry.peer

    async def connect(self, peer: PeerLink, request_id: RequestId, offers: Sequence[Offer]) -> Connection:
        """By the link's transport and no other. Raises TransferError."""
        return await self._ports.connect(
            request_id, [offer for offer in offers if offer.transport == peer.transport], peer.layout
        )

    # ---- one link

    async def serve(self, context: LinkContext) -> None:
        """The Transfer.Link call: returns when the receiver has ended the link, is cancelled when it broke."""
        try:
            link_id, link = await self._begin(context)
        except BatonError as error:
            self._metrics.failed(failure_kind(error))
            log.info("a link to this worker was not made: %s", error)
            await context.abort(link_status(error), str(error))
        try:
            await context.read()  # nothing follows but the end
        finally:
            del self._links[link_id]
            self._metrics.closed(link)
            log.info("the link to %s by %s has ended", link.peer, link.transport)

    async def _begin(self, context: LinkContext) -> tuple[bytes, OpenLink]:
        if self._handshakes >= HANDSHAKES_MAX or len(self._links) >= LINKS_MAX:
            raise Overloaded("This worker has as many links as it can; try again later.")
        self._metrics.attempted("send")
        conversation = Conversation(context.read, context.write, transfer_pb2.LinkRequest)
        self._handshakes += 1
        try:
            async with asyncio.timeout(LINK_TIMEOUT_S):
                guest = await self._sender.welcome(conversation)
                chosen = await self._sender.choose(conversation, guest)
        except TimeoutError:
            raise DeadlineExceeded(f"The link was not made within {LINK_TIMEOUT_S:g} s.") from None
        finally:
            self._handshakes -= 1
        link_id, link = secrets.token_bytes(LINK_ID_BYTES), await self._judged(guest, chosen)
        peer = PeerLink(guest.worker_id, chosen.transport, guest.layout)
        self._links[link_id] = _Entry(peer, TicketChecker(guest.key))
        self._metrics.opened(link)
        log.info("KV blocks go to %s by %s: %s", link.peer, link.transport, link.speed)
        try:
            await conversation.say(_ready(link_id, link))
        except BaseException:
            del self._links[link_id]
            self._metrics.closed(link)
            raise
        return link_id, link

    async def _judged(self, guest: Guest, chosen: Chosen) -> OpenLink:
        measured = chosen.measured
        expected = await self._expectations.bytes_per_s_min(chosen.transport, measured, guest.layout)
        for sample in measured.samples:
            self._on_measured(sample.size_bytes, sample.seconds)
        return OpenLink(
            chosen.transport,
            guest.worker_id,
            measured.latency_s,
            measured.bytes_per_s,
            is_slow=measured.bytes_per_s < expected,
        )


def _ready(link_id: bytes, link: OpenLink) -> transfer_pb2.LinkResponse:
    return transfer_pb2.LinkResponse(
        ready=transfer_pb2.LinkReady(
            link_id=link_id,
            transport=link.transport,
            latency_s=link.latency_s,
            bytes_per_s=link.bytes_per_s,
            is_slow=link.is_slow,
        )
    )
