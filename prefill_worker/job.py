"""One ticket on its way through the prefill worker: sent while it is computed, and told as it lands."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass

from baton.clock import Clock
from baton.errors import InvalidRequest, TransferError
from baton.ids import BlockId, RequestId
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.convert import layout_from_proto, logprobs_to_proto
from engine.interface import Admitted, BlocksDigested, BlocksWritten, Failed, Generated
from engine.worker.prefetch import NOTHING, Prefetched
from kvtransfer.interface import Connection
from prefill_worker.progress import Piece, SendProgress

WRITE_BYTES_MAX = 4 * 2**20
"""In one write: enough for any link to be at its best, and whole blocks land soon although the layers take turns."""
STALL_TIMEOUT_S = 30.0
"""How long one write or fence may take; a link that is slower than WRITE_BYTES_MAX in this time is no link."""
RESENDS_MAX = 2
"""Times the ticket's blocks that the decode worker may ask for again, all in all."""

Tell = Callable[[transfer_pb2.BlocksLanded], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Sending:
    """How jobs send."""

    bytes_in_flight_max: int
    """Written and not yet fenced."""
    after_prefill: bool = False
    """Nothing leaves before the first token is sampled: what streaming is compared with."""
    makes_digests: bool = True
    """Whether the engine does; without, zeros are told."""


@dataclass(frozen=True, slots=True)
class TransferTimes:
    """How much of a transfer the prefill hid."""

    bytes: int
    busy_s: float
    exposed_s: float
    """From the first token to the last fence."""

    @property
    def hidden_s(self) -> float:
        return max(0.0, self.busy_s - self.exposed_s)


class PrefillJob:
    """Fed by the engine (`admitted`, `written`, `digested`, `generated`, `failed`) and the decode worker (`resend`);
    drained by `send` and then by `send_again`.

    Lives on the worker's loop. The engine's blocks are the job's until the worker releases or aborts the
    request, which it must not do before the connection is closed.
    """

    def __init__(
        self,
        request_id: RequestId,
        ticket: worker_pb2.Ticket,
        connection: Connection,
        sending: Sending,
        clock: Clock,
    ) -> None:
        """What the engine tells must be of blocks of the ticket's size (else prefill_worker/recut.py)."""
        loop = asyncio.get_running_loop()
        self.request_id = request_id
        self.connection = connection
        self.is_committed = False
        self._sending, self._clock = sending, clock
        self._layout = layout_from_proto(ticket.layout)
        self._first_block = ticket.first_block
        self._target = tuple(BlockId(block) for block in ticket.blocks)
        self._source: Sequence[BlockId] = ()
        self._piece_bytes = 2 * self._layout.slice_bytes
        piece_blocks_max = max(1, min(WRITE_BYTES_MAX, sending.bytes_in_flight_max) // self._piece_bytes)
        self._piece_blocks_max = piece_blocks_max
        self._progress = SendProgress(self._layout.layers, len(self._target), piece_blocks_max)
        if not sending.makes_digests:
            self._progress.digested(0, (0,) * len(self._target))
        self._unfenced_bytes = 0
        self._again: deque[int] = deque()
        self._resends_left = RESENDS_MAX * len(self._target)
        self._wake = asyncio.Event()
        self._arrived_s = clock()
        self._admitted_s = self._generated_s = self._landed_s = self._arrived_s
        self._prefetched = NOTHING
        self._is_admitted: asyncio.Future[Admitted] = loop.create_future()
        self._first_token: asyncio.Future[Generated] = loop.create_future()

    def prefetched(self, prefetched: Prefetched) -> None:
        """Before it is admitted."""
        self._prefetched = prefetched

    # ---- from the engine

    def admitted(self, event: Admitted) -> None:
        self._admitted_s = self._clock()
        self._source = event.blocks[self._first_block :]
        self._digested(0, event.digests)
        cached_blocks = (event.cached_tokens - event.restoring_tokens) // self._layout.block_tokens
        for layer in range(self._layout.layers):
            self._final(layer, cached_blocks)
        self._is_admitted.set_result(event)

    def written(self, layer: int, event: BlocksWritten) -> None:
        self._final(layer, event.end)

    def digested(self, event: BlocksDigested) -> None:
        self._digested(event.first, event.digests)

    def generated(self, event: Generated, at_s: float | None = None) -> None:
        """`at_s` is when it was, if that is not now."""
        self._generated_s = self._clock() if at_s is None else at_s
        self._first_token.set_result(event)
        self._wake.set()

    def failed(self, event: Failed) -> None:
        for outcome in (self._is_admitted, self._first_token):
            if not outcome.done():
                outcome.set_exception(event.error)
                outcome.exception()  # whoever awaits it raises it; nobody has to
        self._wake.set()

    def _final(self, layer: int, end: int) -> None:
        self._progress.final(layer, end - self._first_block)
        self._wake.set()

    def _digested(self, first: int, digests: tuple[int, ...]) -> None:
        if self._sending.makes_digests and digests:
            self._progress.digested(first - self._first_block, digests)
            self._wake.set()

    # ---- from the decode worker

    def resend(self, indices: Sequence[int]) -> None:
        """Raises InvalidRequest for blocks that were not told to have landed, or if it is asked too often."""
        if any(index >= self._progress.told for index in indices):
            raise InvalidRequest("Blocks were asked for again that had not landed.", "indices")
        self._resends_left -= len(indices)
        if self._resends_left < 0:
            raise InvalidRequest(f"Blocks were asked for again more than {RESENDS_MAX} times.", "indices")
        self._again.extend(indices)
        self._wake.set()

    # ---- to the decode worker

    async def started(self) -> worker_pb2.PrefillStarted:
        event = await asyncio.shield(self._is_admitted)
        return worker_pb2.PrefillStarted(
            transport=self.connection.transport,
            queue_s=max(self._admitted_s - self._arrived_s - self._prefetched.seconds, 0.0),
            cached_tokens=event.cached_tokens,
            fetched_tokens=self._prefetched.tokens,
            fetch_s=self._prefetched.seconds,
        )

    async def send(self, tell: Tell) -> None:
        """Writes every block of the ticket, each layer of it as soon as it is ready, and tells of those that landed
        whole. Returns when all are told and the first token is there.

        Raises TransferError from the connection, or the engine's error if the request failed there.
        """
        while not (self._progress.is_done and self._first_token.done()):
            if not await self._advance(tell):
                await self._wait()

    async def send_again(self, tell: Tell) -> None:
        """Blocks that did not match where they landed, as they are asked for; until cancelled."""
        while True:
            while self._again:
                await self._rewrite(tell)
            self._wake.clear()
            await self._wake.wait()

    async def _advance(self, tell: Tell) -> bool:
        """One thing that can be done now; false: there is none."""
        if landed := self._progress.next_landed():
            first, digests = landed
            await tell(transfer_pb2.BlocksLanded(first=first, digests=digests))
        elif self._again:
            await self._rewrite(tell)
        elif piece := self._next_piece():
            await self._write(piece)
        else:
            return False
        return True

    def _next_piece(self) -> Piece | None:
        if self._sending.after_prefill and not self._first_token.done():
            return None
        return self._progress.next_piece()

    async def _wait(self) -> None:
        if self._first_token.done():  # it comes after the last slice and digest, unless the request failed
            self._first_token.result()
            raise AssertionError("some of the ticket's blocks were never computed, or never digested")
        self._wake.clear()
        await self._wake.wait()

    async def _write(self, piece: Piece) -> None:
        some = slice(piece.first, piece.end)
        await self._write_blocks(piece.layer, self._source[some], self._target[some])
        self._progress.written(piece)
        if self._progress.completes_blocks:
            await self._fence()

    async def _write_blocks(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        size_bytes = len(source) * self._piece_bytes
        if self._unfenced_bytes and self._unfenced_bytes + size_bytes > self._sending.bytes_in_flight_max:
            await self._fence()
        await _unless_stalled(self.connection.write(layer, source, target))
        self._unfenced_bytes += size_bytes

    async def _fence(self) -> None:
        await _unless_stalled(self.connection.fence())
        self._unfenced_bytes = 0
        self._progress.landed()
        self._landed_s = self._clock()

    async def _rewrite(self, tell: Tell) -> None:
        indices = [self._again.popleft() for _ in range(min(len(self._again), self._piece_blocks_max))]
        for layer in range(self._layout.layers):
            await self._write_blocks(
                layer, [self._source[index] for index in indices], [self._target[index] for index in indices]
            )
        await self._fence()
        for index in indices:
            await tell(transfer_pb2.BlocksLanded(first=index, digests=[self._progress.digests[index]]))

    def commit(self) -> worker_pb2.PrefillCommit:
        """After `send`: the first token and what the transfer took. Raises the engine's error."""
        first = self._first_token.result()
        times = self.times
        return worker_pb2.PrefillCommit(
            first_token=first.token_ids[0],
            blocks=len(self._target),
            transfer_bytes=times.bytes,
            prefill_s=self._generated_s - self._admitted_s,
            transfer_s=times.busy_s,
            transfer_exposed_s=times.exposed_s,
            logprobs=logprobs_to_proto(first.logprobs[0]) if first.logprobs else None,
            restored_tokens=first.restored_tokens,
            restore_s=first.restore_s,
        )

    @property
    def times(self) -> TransferTimes:
        """So far."""
        exposed_s = max(0.0, self._landed_s - self._generated_s)
        return TransferTimes(self.connection.bytes_written, self.connection.busy_s, exposed_s)


async def _unless_stalled(operation: Coroutine[object, object, None]) -> None:
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            await operation
    except TimeoutError:
        raise TransferError(f"The link moved nothing for {STALL_TIMEOUT_S:g} s.") from None
