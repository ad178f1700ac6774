"""The Transfer.Fetch call: each is one ticket, and the call's stream is the lease on it."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc.aio

from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, UnsupportedModel
from baton.ids import BlockHash, BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2
from baton.rpc.convert import layout_from_proto
from baton.rpc.status_codes import status_code
from baton.rpc.streams import SerialWriter
from kvtransfer.fetch.sending import Sending
from kvtransfer.fetch.source import BlockSource, HeldBlocks
from kvtransfer.interface import Connection, Offer
from kvtransfer.link.servicer import LinkBook, PeerLink

FETCHES_MAX = 64
"""At one time; past it they are refused, and the receiver computes what it wanted."""
FETCH_TIMEOUT_S = 120.0
"""Longest that one fetch may hold blocks, whatever its ticket says."""
TICKET_TIMEOUT_S = 10.0
"""How long a stream may say nothing at first."""
BYTES_IN_FLIGHT_MAX = 64 * 2**20

FetchContext: TypeAlias = "grpc.aio.ServicerContext[transfer_pb2.FetchRequest, transfer_pb2.FetchResponse]"


def _ignore(size_bytes: int, seconds: float) -> None:
    del size_bytes, seconds


class FetchServicer:
    """The sender's side. However a fetch ends - done, taken back, broken, failed or too late - its connection is closed
    and its blocks are let go first."""

    def __init__(
        self,
        book: LinkBook,
        source: BlockSource,
        fingerprint: str,
        layout: KVLayout,
        bytes_in_flight_max: int = BYTES_IN_FLIGHT_MAX,
        timeout_s: float = FETCH_TIMEOUT_S,
        on_sent: Callable[[int, float], None] = _ignore,
    ) -> None:
        """`fingerprint` and `layout` are this worker's. `on_sent` is told the bytes of each fetch that was sent whole,
        and the seconds that took."""
        self._book, self._source = book, source
        self._fingerprint, self._layout = fingerprint, layout
        self._bytes_in_flight_max, self._timeout_s, self._on_sent = bytes_in_flight_max, timeout_s, on_sent
        self._fetches: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._fetches)

    async def serve(self, context: FetchContext) -> None:
        """Returns when the receiver wants no more of it, is cancelled when the stream broke."""
        try:
            if len(self._fetches) >= FETCHES_MAX:
                raise Overloaded("This worker is asked for as many blocks as it can send; try again later.")
            ticket = await _ticket(context)
            if await self._run(ticket, self._check(ticket), context):
                await context.write(transfer_pb2.FetchResponse(released=transfer_pb2.FetchReleased()))
        except BatonError as error:
            await context.abort(status_code(error), str(error))

    async def close(self) -> None:
        """Idempotent. Ends what is under way; after it nothing is read or written any more."""
        while self._fetches:
            for task in self._fetches:
                _end(task)
            await asyncio.wait(self._fetches)

    def _check(self, ticket: transfer_pb2.FetchTicket) -> PeerLink:
        """Raises BatonError if the ticket is refused."""
        peer = self._book.check(ticket)
        if ticket.fingerprint != self._fingerprint:
            raise UnsupportedModel("Model, weights or dtype of the two workers differ; their KV blocks must not mix.")
        if layout_from_proto(ticket.layout) != peer.layout or not self._layout.is_compatible(peer.layout):
            raise UnsupportedModel("The receiver's KV blocks are not laid out as this worker's, or as its link said.")
        if len(ticket.names) != len(ticket.blocks) or len(ticket.names) > self._layout.blocks:
            raise InvalidRequest("The ticket must have a block for each name, and not more than there are.", "blocks")
        return peer

    async def _run(self, ticket: transfer_pb2.FetchTicket, peer: PeerLink, context: FetchContext) -> bool:
        """Whether the receiver took the ticket back. Raises what failed, or DeadlineExceeded."""
        timeout_s = min(ticket.deadline_s or self._timeout_s, self._timeout_s)
        receiver = _Receiver(context)
        work = asyncio.create_task(self._serve(ticket, peer, receiver))
        self._fetches.add(work)  # not the call's alone: what cancels the call must not keep this from ending well
        work.add_done_callback(self._ended)
        listening = asyncio.create_task(receiver.listen())
        try:
            done, _ = await asyncio.wait({work, listening}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"The fetch was not done within {timeout_s:g} s.")
            if work.cancelled():
                raise Unavailable("This worker is shutting down.")
            for task in done:
                task.result()
            return receiver.took_back
        finally:
            _end(work)
            listening.cancel()
            await asyncio.gather(asyncio.wait({work}), listening, return_exceptions=True)

    def _ended(self, work: "asyncio.Task[None]") -> None:
        self._fetches.discard(work)
        if not work.cancelled():
            work.exception()  # the call has raised it, or has been cancelled by a stream that broke

    async def _serve(self, ticket: transfer_pb2.FetchTicket, peer: PeerLink, receiver: "_Receiver") -> None:
        """Returns at once where there is nothing to send; else when cancelled."""
        async with self._source.hold([BlockHash(name) for name in ticket.names]) as held:
            if not held.blocks:
                await receiver.tell(started=transfer_pb2.FetchStarted(blocks=0))
                await receiver.tell(done=transfer_pb2.FetchDone())
                return
            offers = [Offer(offer.transport, offer.descriptor) for offer in ticket.offers]
            connection = await self._book.connect(peer, RequestId(ticket.request_id), offers)
            try:
                await self._send(connection, held, ticket, receiver)
            finally:
                await connection.close()

    async def _send(
        self, connection: Connection, held: HeldBlocks, ticket: transfer_pb2.FetchTicket, receiver: "_Receiver"
    ) -> None:
        """Until cancelled."""
        target = [BlockId(block) for block in ticket.blocks[: len(held.blocks)]]
        sending = Sending(connection, self._layout, held, target, self._bytes_in_flight_max)
        receiver.sending = sending
        await receiver.tell(started=transfer_pb2.FetchStarted(blocks=len(target), transport=connection.transport))
        await sending.send(receiver.landed)
        sent = transfer_pb2.FetchDone(transfer_bytes=connection.bytes_written, transfer_s=connection.busy_s)
        self._on_sent(sent.transfer_bytes, sent.transfer_s)
        await receiver.tell(done=sent)
        await sending.send_again(receiver.landed)


async def _ticket(context: FetchContext) -> transfer_pb2.FetchTicket:
    """Raises InvalidRequest or DeadlineExceeded."""
    try:
        async with asyncio.timeout(TICKET_TIMEOUT_S):
            first = await context.read()
    except TimeoutError:
        raise DeadlineExceeded(f"No ticket came within {TICKET_TIMEOUT_S:g} s.") from None
    if not isinstance(first, transfer_pb2.FetchRequest) or first.WhichOneof("message") != "ticket":
        raise InvalidRequest("The first message of a Fetch stream must be a ticket.")
    return first.ticket


def _end(task: "asyncio.Task[None]") -> None:
    """Cancels it once: a second time would break off what it does at its end."""
    if not task.cancelling():
        task.cancel()


class _Receiver:
    """Who asked, at the other end of the call."""

    def __init__(self, context: FetchContext) -> None:
        self.sending: Sending | None = None
        self.took_back = False
        self._context, self._respond = context, SerialWriter(context.write)

    async def listen(self) -> None:
        """Until the receiver takes the ticket back or ends its side. Raises InvalidRequest."""
        while isinstance(request := await self._context.read(), transfer_pb2.FetchRequest):
            match request.WhichOneof("message"):
                case "resend" if self.sending is not None:
                    self.sending.ask_again(request.resend.indices)
                case "cancel":
                    self.took_back = True
                    return
                case _:
                    raise InvalidRequest("A Fetch stream has one ticket, and blocks are asked for again later.")

    async def landed(self, blocks: transfer_pb2.BlocksLanded) -> None:
        await self.tell(landed=blocks)

    async def tell(self, **message: Any) -> None:
        """One field of FetchResponse."""
        await self._respond(transfer_pb2.FetchResponse(**message))
