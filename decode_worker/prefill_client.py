"""Asks a prefill worker for a prompt's KV blocks, and ends every attempt in one explicit outcome."""

import asyncio
import logging
from typing import TypeAlias

import grpc.aio

from baton.errors import Unavailable
from baton.process import ProcessIdentity
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.rpc.streams import SerialWriter
from baton.service import CHANNEL_OPTIONS

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 5.0
"""How long a prefill worker may take to answer a cancel, or, on this machine, to be seen dead."""
CHANNELS_MAX = 1024


PrefillCall: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]"
Outcome = tuple[worker_pb2.PrefillStarted, worker_pb2.PrefillCommit]


class PrefillCancelled(Exception):
    """The caller took the ticket back, and the prefill worker has let go of it."""


class PrefillClient:
    """One channel per prefill worker, shared by all tickets."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def prefill(self, address: str, ticket: worker_pb2.Ticket, cancelled: asyncio.Event) -> Outcome:
        """Returns when every block of the ticket has landed.

        Raises Unavailable if this prefill worker cannot do it, PrefillCancelled once `cancelled` is set.
        Whatever the outcome, when this returns or raises nothing writes into the ticket's blocks any more:
        the prefill worker said so, its process is gone, or it had RELEASE_TIMEOUT_S to notice.
        """
        call = worker_pb2_grpc.PrefillWorkerStub(await self._channel(address)).Prefill()
        attempt = _Attempt(call)
        taken_back = asyncio.ensure_future(cancelled.wait())
        try:
            work = asyncio.ensure_future(attempt.run(ticket))
            await asyncio.wait({work, taken_back}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            await attempt.take_back(work)
            if cancelled.is_set():
                raise PrefillCancelled
            raise Unavailable(f"The prefill worker at {address} did not finish within {self._timeout_s:g} s.")
        except grpc.aio.AioRpcError as error:
            await attempt.wait_until_writer_is_gone()
            raise Unavailable(
                f"The prefill worker at {address} failed: {error.code().name}: {error.details()}"
            ) from None
        finally:
            taken_back.cancel()
            call.cancel()

    async def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            if len(self._channels) >= CHANNELS_MAX:  # workers came and went; the oldest is the likeliest gone
                await self._channels.pop(next(iter(self._channels))).close()
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[address]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class _Attempt:
    """One ticket at one prefill worker."""

    def __init__(self, call: "PrefillCall") -> None:
        self._call = call
        self._write = SerialWriter(call.write)
        self._started: worker_pb2.PrefillStarted | None = None

    async def run(self, ticket: worker_pb2.Ticket) -> Outcome:
        await self._write(worker_pb2.PrefillRequest(ticket=ticket))
        while isinstance(response := await self._call.read(), worker_pb2.PrefillResponse):
            match response.WhichOneof("message"):
                case "started":
                    self._started = response.started
                case "commit":
                    return self._checked(ticket, response.commit)
                case _:
                    raise PrefillCancelled
        # The stream ended without a commit: its status says why, and awaiting it raises that.
        await self._call.read()
        raise Unavailable("The prefill worker ended the stream before it committed.")

    def _checked(self, ticket: worker_pb2.Ticket, commit: worker_pb2.PrefillCommit) -> Outcome:
        if self._started is None or commit.blocks != len(ticket.blocks):
            raise Unavailable(
                f"The prefill worker committed {commit.blocks} blocks where {len(ticket.blocks)} were asked for, "
                "or before it had started."
            )
        return self._started, commit

    async def take_back(self, work: asyncio.Future[Outcome]) -> None:
        """Cancels the ticket and waits until nothing is written under it."""
        try:
            await self._write(worker_pb2.PrefillRequest(cancel=worker_pb2.PrefillCancel()))
            await asyncio.wait_for(work, RELEASE_TIMEOUT_S)  # ends with `released`, a late commit or an error
        except PrefillCancelled:
            pass
        except TimeoutError:
            log.warning("a prefill worker did not answer a cancel within %g s", RELEASE_TIMEOUT_S)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, Unavailable):
            await self.wait_until_writer_is_gone()

    async def wait_until_writer_is_gone(self) -> None:
        """After a broken stream: a one-sided writer on this machine may still be in a copy.

        Dead, it writes no more. Alive, it notices the broken stream itself, and has RELEASE_TIMEOUT_S to.
        """
        if self._started is None or self._started.transport != "shm":
            return
        writer = ProcessIdentity(self._started.writer_pid, self._started.writer_started_ticks)
        deadline_s = asyncio.get_running_loop().time() + RELEASE_TIMEOUT_S
        while writer.is_alive and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)
