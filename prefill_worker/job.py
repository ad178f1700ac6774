"""One ticket on its way through the prefill worker: which slices to send, and when all have been sent."""

import asyncio
from collections import deque
from dataclasses import dataclass

from baton.clock import Clock
from baton.ids import BlockId, RequestId
from baton.process import ProcessIdentity
from baton.rpc import worker_pb2
from baton.rpc.convert import logprobs_to_proto
from engine.interface import Admitted, BlocksWritten, Failed, Generated
from kvtransfer.interface import Connection


@dataclass(frozen=True, slots=True)
class _Ready:
    """In one layer, the prompt's blocks `[first, end)` may be sent."""

    layer: int
    first: int
    end: int


class PrefillJob:
    """Fed by the engine (`admitted`, `written`, `generated`, `failed`), drained by `send`.

    Lives on the worker's loop. The engine's blocks are the job's until the worker releases or aborts the
    request, which it must not do before the connection is closed or fenced.
    """

    def __init__(self, request_id: RequestId, ticket: worker_pb2.Ticket, connection: Connection, clock: Clock) -> None:
        loop = asyncio.get_running_loop()
        self.request_id = request_id
        self.connection = connection
        self._first_block = ticket.first_block
        self._target = tuple(BlockId(block) for block in ticket.blocks)
        self._slices_left = ticket.layout.layers * len(self._target)
        self._layers = ticket.layout.layers
        self._block_tokens = ticket.layout.block_tokens
        self._source: tuple[BlockId, ...] = ()
        self._ready: deque[_Ready] = deque()
        self._wake = asyncio.Event()
        self._clock = clock
        self._arrived_s = clock()
        self._admitted_s = self._generated_s = self._landed_s = self._arrived_s
        self._is_admitted: asyncio.Future[Admitted] = loop.create_future()
        self._first_token: asyncio.Future[Generated] = loop.create_future()

    # ---- from the engine

    def admitted(self, event: Admitted) -> None:
        self._admitted_s = self._clock()
        self._source = event.blocks
        cached_blocks = event.cached_tokens // self._block_tokens
        for layer in range(self._layers):
            self._offer(layer, 0, cached_blocks)
        self._is_admitted.set_result(event)

    def written(self, layer: int, event: BlocksWritten) -> None:
        self._offer(layer, event.first, event.end)

    def generated(self, event: Generated) -> None:
        self._generated_s = self._clock()
        self._first_token.set_result(event)
        self._wake.set()

    def failed(self, event: Failed) -> None:
        for outcome in (self._is_admitted, self._first_token):
            if not outcome.done():
                outcome.set_exception(event.error)
                outcome.exception()  # whoever awaits it raises it; nobody has to
        self._wake.set()

    def _offer(self, layer: int, first: int, end: int) -> None:
        first = max(first, self._first_block)
        if first < end:
            self._ready.append(_Ready(layer, first, end))
            self._wake.set()

    # ---- to the decode worker

    async def started(self) -> worker_pb2.PrefillStarted:
        event = await asyncio.shield(self._is_admitted)
        writer = ProcessIdentity.own()
        return worker_pb2.PrefillStarted(
            transport=self.connection.transport,
            queue_s=self._admitted_s - self._arrived_s,
            cached_tokens=event.cached_tokens,
            writer_pid=writer.pid,
            writer_started_ticks=writer.started_ticks,
        )

    async def send(self) -> None:
        """Writes every slice that the ticket asks for, each as soon as it is ready, and fences.

        Raises TransferError from the connection, or the engine's error if the request failed there.
        """
        while self._slices_left:
            await self._next_ready()
            ready = self._ready.popleft()
            offset = ready.first - self._first_block
            blocks = ready.end - ready.first
            await self.connection.write(
                ready.layer, self._source[ready.first : ready.end], self._target[offset : offset + blocks]
            )
            self._slices_left -= blocks
        await self.connection.fence()
        self._landed_s = self._clock()

    async def _next_ready(self) -> None:
        while not self._ready:
            if self._first_token.done():  # it comes after the last slice, unless the request failed
                self._first_token.result()
                raise AssertionError(f"{self._slices_left} slices were never computed")
            self._wake.clear()
            await self._wake.wait()

    async def commit(self) -> worker_pb2.PrefillCommit:
        """After `send`: the first token and what the transfer took."""
        first = await asyncio.shield(self._first_token)
        return worker_pb2.PrefillCommit(
            first_token=first.token_ids[0],
            blocks=len(self._target),
            transfer_bytes=self.connection.bytes_written,
            prefill_s=self._generated_s - self._admitted_s,
            transfer_s=self.connection.busy_s,
            transfer_exposed_s=max(0.0, self._landed_s - self._generated_s),
            logprobs=logprobs_to_proto(first.logprobs[0]) if first.logprobs else None,
        )
