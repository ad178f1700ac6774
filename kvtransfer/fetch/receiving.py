"""One fetch's stream, from the receiver's side: reads what the sender says, and verifies what landed."""

import asyncio
import contextlib
from typing import TypeAlias

import grpc.aio

from baton.errors import BatonError, TransferError, Unavailable
from baton.ids import BlockId
from baton.rpc import transfer_pb2
from baton.rpc.streams import SerialWriter
from kvtransfer.landing import Landing
from kvtransfer.link.proof import UNKNOWN_LINK, UnknownLink
from kvtransfer.verify import Verifier

FetchCall: TypeAlias = "grpc.aio.StreamStreamCall[transfer_pb2.FetchRequest, transfer_pb2.FetchResponse]"


class Receiving:
    """`run` by one task, `take_back` by another, then `close`."""

    def __init__(
        self, call: "FetchCall", ticket: transfer_pb2.FetchTicket, landing: Landing, verifier: Verifier
    ) -> None:
        self.sent = transfer_pb2.FetchDone()
        """What the sender said of it at the end."""
        self._call, self._ticket, self._landing, self._verifier = call, ticket, landing, verifier
        self._write = SerialWriter(call.write)
        self._is_done = False

    async def run(self) -> None:
        """Returns when every block that the sender has is right here and both sides have ended the stream, or when the
        ticket was taken back. Raises UnknownLink, Unavailable or TransferError."""
        try:
            await self._try_to_write(transfer_pb2.FetchRequest(ticket=self._ticket))
            while isinstance(response := await self._call.read(), transfer_pb2.FetchResponse):
                if not await self._take_in(response):
                    return
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._reason() from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Unavailable("The channel to the sender was closed.") from None
        if not (self._is_done and self._landing.is_right):
            raise await self._reason()

    async def take_back(self) -> None:
        await self._try_to_write(transfer_pb2.FetchRequest(cancel=transfer_pb2.FetchCancel()))

    def close(self) -> None:
        """Breaks the stream if it has not ended. Idempotent."""
        self._call.cancel()

    async def _take_in(self, response: transfer_pb2.FetchResponse) -> bool:
        """Whether more is to come."""
        match response.WhichOneof("message"):
            case "started":
                self._landing.started(response.started.blocks)
            case "landed":
                await self._verify(response.landed)
            case "done":
                self._is_done, self.sent = True, response.done
            case _:
                return False
        if self._is_done and self._landing.is_right:
            await self._call.done_writing()
        return True

    async def _verify(self, landed: transfer_pb2.BlocksLanded) -> None:
        """The sender goes on meanwhile."""
        told = self._landing.landed(landed.first, landed.digests)
        blocks = [BlockId(self._ticket.blocks[index]) for index in told]
        again = self._landing.verified(told, await self._verifier.mismatches(blocks, landed.digests))
        if again:
            self._verifier.metrics.resent(len(again))
            await self._try_to_write(transfer_pb2.FetchRequest(resend=transfer_pb2.ResendBlocks(indices=again)))

    async def _try_to_write(self, request: transfer_pb2.FetchRequest) -> None:
        """On a stream that has ended nothing is written; whoever reads learns why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write that begins before there is a connection may never end, not even when the call is cancelled.
            await self._call.wait_for_connection()
            await self._write(request)

    async def _reason(self) -> BatonError:
        """Why the stream ended; it has."""
        code, details = await self._call.code(), await self._call.details()
        if details == UNKNOWN_LINK:
            return UnknownLink()
        if code is grpc.StatusCode.OK:
            return TransferError("The sender ended the fetch before every block was right here.")
        return Unavailable(f"The sender failed: {code.name}: {details}")


def _is_cancelled() -> bool:
    """Whether it is this task that was cancelled, and not the call beneath it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
