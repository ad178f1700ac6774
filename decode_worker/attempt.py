"""One ticket at one prefill worker: reads what it says, verifies what lands, and ends in one outcome."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import grpc.aio

from baton.errors import TransferError, Unavailable
from baton.ids import BlockId
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.streams import SerialWriter
from kvtransfer.landing import Landing
from kvtransfer.verify import Verifier

PrefillCall: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]"


@dataclass(frozen=True, slots=True)
class Filled:
    """Every block of the ticket lies here and was verified."""

    started: worker_pb2.PrefillStarted
    commit: worker_pb2.PrefillCommit
    digests: tuple[int, ...]
    """Of each block; none, where the prefill worker makes none."""


class Attempt:
    """`begin`, wait for `outcome`, then `take_back` or `hang_up`, and `close`.

    The outcome is Filled, or Unavailable or TransferError, or the error that ended the stream.
    """

    def __init__(self, call: "PrefillCall", ticket: worker_pb2.Ticket, verifier: Verifier) -> None:
        self.outcome: asyncio.Future[Filled] = asyncio.get_running_loop().create_future()
        self._call, self._ticket, self._verifier = call, ticket, verifier
        self._write = SerialWriter(call.write)
        self._landing = Landing(len(ticket.blocks))
        self._started: worker_pb2.PrefillStarted | None = None
        self._commit: worker_pb2.PrefillCommit | None = None
        self._reading: asyncio.Task[None] | None = None
        self.was_taken_back = False
        self._verifications: set[asyncio.Task[None]] = set()
        """Two for each block at most: it is told once, and once more where it was asked for again."""

    def begin(self) -> None:
        self._reading = asyncio.create_task(self._settling(self._read))

    async def take_back(self) -> None:
        """Returns when the prefill worker has let go of the ticket, or the stream has ended in another way."""
        assert self._reading is not None
        self.was_taken_back = True
        await self._try_to_write(worker_pb2.PrefillRequest(cancel=worker_pb2.PrefillCancel()))
        await asyncio.wait({self._reading})

    async def hang_up(self) -> None:
        """The prefill worker may let go of its blocks. Returns when it has ended the stream."""
        assert self._reading is not None
        await self._call.done_writing()
        await asyncio.wait({self._reading})

    async def close(self) -> None:
        """Idempotent; breaks the stream if it has not ended."""
        self._call.cancel()
        tasks = {*self._verifications, *({self._reading} if self._reading else ())}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.outcome.cancel()

    # ---- what comes

    async def _read(self) -> None:
        """Until the stream ends."""
        await self._try_to_write(worker_pb2.PrefillRequest(ticket=self._ticket))
        while isinstance(response := await self._call.read(), worker_pb2.PrefillResponse):
            match response.WhichOneof("message"):
                case "started":
                    self._started = response.started
                    self._landing.started(len(self._ticket.blocks))
                case "landed":
                    self._take_in(response.landed)
                case "commit":
                    self._commit = self._checked(response.commit)
                    self._finish_if_right()
                case _:
                    break
        # If it ended without a commit, its status says why, and awaiting it raises that.
        await self._call.read()
        raise Unavailable("The prefill worker ended the stream before every block was right here.")

    def _checked(self, commit: worker_pb2.PrefillCommit) -> worker_pb2.PrefillCommit:
        wanted = len(self._ticket.blocks)
        if self._started is None or commit.blocks != wanted or not self._landing.was_told_all:
            raise Unavailable(
                f"The prefill worker committed {commit.blocks} blocks where {wanted} were asked for, "
                "or before it had started or told that they landed."
            )
        return commit

    def _take_in(self, message: transfer_pb2.BlocksLanded) -> None:
        told = self._landing.landed(message.first, message.digests)
        task = asyncio.create_task(self._settling(partial(self._verify, told, message.digests)))
        self._verifications.add(task)
        task.add_done_callback(self._verifications.discard)

    async def _verify(self, told: range, digests: Sequence[int]) -> None:
        blocks = [BlockId(self._ticket.blocks[index]) for index in told]
        again = self._landing.verified(told, await self._verifier.mismatches(blocks, digests))
        if again:
            self._verifier.metrics.resent(len(again))
            resend = transfer_pb2.ResendBlocks(indices=again)
            await self._try_to_write(worker_pb2.PrefillRequest(resend=resend))
        self._finish_if_right()

    def _finish_if_right(self) -> None:
        if self._commit is not None and self._landing.is_right and not self.outcome.done():
            assert self._started is not None
            digests = self._landing.digests if any(self._landing.digests) else ()
            self.outcome.set_result(Filled(self._started, self._commit, digests))

    async def _settling(self, work: Callable[[], Awaitable[None]]) -> None:
        """What fails first is the outcome. `work` begins when this does, which may be cancelled before."""
        try:
            await work()
        except (Unavailable, TransferError, grpc.aio.AioRpcError) as error:
            if not self.outcome.done():
                self.outcome.set_exception(error)
                self.outcome.exception()  # whoever awaits it raises it; nobody has to

    async def _try_to_write(self, request: worker_pb2.PrefillRequest) -> None:
        """On a stream that has ended nothing is written; whoever reads learns why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write that begins before there is a connection may never end, not even when the call is cancelled.
            await self._call.wait_for_connection()
            await self._write(request)
