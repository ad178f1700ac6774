"""Asks a prefill worker for a prompt's KV blocks, and ends every attempt in one explicit outcome.

| what happens                         | seen by                  | outcome here            | within            |
|--------------------------------------|--------------------------|-------------------------|-------------------|
| all blocks landed and match          | commit, verification     | Filled                  |                   |
| a block does not match its digest    | verification             | it is asked for again   |                   |
| nor after it was sent again          | verification             | Unavailable             |                   |
| refused, or it failed there          | status of the stream     | Unavailable             |                   |
| link unknown: the worker began anew  | status of the stream     | UnknownLink             |                   |
| prefill worker dead                  | the stream breaks        | Unavailable             | at once           |
| prefill worker or network silent     | gRPC keepalive           | Unavailable             | 15 s              |
| link stalls half-way through a block | its write there ends     | Unavailable             | 30 s              |
| request cancelled, or its deadline   | `cancelled`              | PrefillCancelled        | RELEASE_TIMEOUT_S |
| anything else that does not end      | `timeout_s`              | Unavailable             | RELEASE_TIMEOUT_S |

On the prefill worker each of these is the end of the stream, and with it of the ticket: its blocks are let go, and its
connection is closed. Here the ticket's blocks are fenced afterwards (decode_worker/remote_prefill.py).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from baton.errors import Unavailable
from baton.rpc import worker_pb2, worker_pb2_grpc
from decode_worker.attempt import Attempt, Filled
from kvtransfer.link.proof import UNKNOWN_LINK, UnknownLink
from kvtransfer.verify import Verifier

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
"""How long a prefill worker may take to answer a cancel, or to end the stream after the commit. What it may still write
afterwards is the fence's to find out."""


class PrefillCancelled(Exception):
    """The caller took the ticket back."""


class PrefillClient:
    def __init__(
        self, channel: Callable[[str], Awaitable[grpc.aio.Channel]], verifier: Verifier, timeout_s: float
    ) -> None:
        """`timeout_s` bounds each attempt."""
        self._channel, self._verifier, self._timeout_s = channel, verifier, timeout_s
        self._leaving: set[asyncio.Task[None]] = set()

    async def prefill(self, address: str, ticket: worker_pb2.Ticket, cancelled: asyncio.Event) -> Filled:
        """Returns when every block of the ticket has landed and been verified.

        Raises Unavailable if this prefill worker cannot do it, UnknownLink if that is because the link must be made
        anew, TransferError if what landed is not right, PrefillCancelled once `cancelled` is set.
        """
        call = worker_pb2_grpc.PrefillWorkerStub(await self._channel(address)).Prefill()
        attempt = Attempt(call, ticket, self._verifier)
        attempt.begin()
        try:
            filled = await self._until_outcome(address, attempt, cancelled)
        except BaseException:
            await attempt.close()
            raise
        self._leave(attempt)
        return filled

    async def _until_outcome(self, address: str, attempt: Attempt, cancelled: asyncio.Event) -> Filled:
        taken_back = asyncio.ensure_future(cancelled.wait())
        ends: set[asyncio.Future[Any]] = {attempt.outcome, taken_back}
        try:
            await asyncio.wait(ends, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            taken_back.cancel()
        if not attempt.outcome.done():
            await _within_bound(attempt.take_back())
        if cancelled.is_set():
            raise PrefillCancelled
        if not attempt.outcome.done() or attempt.was_taken_back:
            raise Unavailable(f"The prefill worker at {address} did not finish within {self._timeout_s:g} s.")
        try:
            return attempt.outcome.result()
        except grpc.aio.AioRpcError as error:
            if error.details() == UNKNOWN_LINK:
                raise UnknownLink from None
            raise Unavailable(
                f"The prefill worker at {address} failed: {error.code().name}: {error.details()}"
            ) from None

    def _leave(self, attempt: Attempt) -> None:
        """Ends a stream that has done its work, while others go on with what it brought."""
        task = asyncio.create_task(_hang_up(attempt))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Waits for streams that are ending, RELEASE_TIMEOUT_S at most."""
        if self._leaving:
            await asyncio.wait(self._leaving)


async def _hang_up(attempt: Attempt) -> None:
    try:
        await _within_bound(attempt.hang_up())
    finally:
        await attempt.close()


async def _within_bound(goodbye: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT_S):
            await goodbye
    except TimeoutError:
        log.warning("a prefill worker did not let go of a ticket within %g s", RELEASE_TIMEOUT_S)
