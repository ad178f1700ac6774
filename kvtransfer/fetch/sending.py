"""Sends the held blocks of one fetch: group by group, so that one is verified while the next is on its way."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from itertools import pairwise

from baton.errors import InvalidRequest, TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2
from kvtransfer.fetch.source import HeldBlocks
from kvtransfer.interface import Connection

GROUP_BYTES_MAX = 16 * 2**20
"""Sent between two fences, and at least one block."""
STALL_TIMEOUT_S = 30.0
"""How long one write or fence may take."""
RESENDS_MAX = 2
"""Times the fetch's blocks that the receiver may ask for again, all in all."""

Tell = Callable[[transfer_pb2.BlocksLanded], Awaitable[None]]


class Sending:
    """Used by one task, but for `ask_again`."""

    def __init__(
        self, connection: Connection, layout: KVLayout, held: HeldBlocks, target: Sequence[BlockId], bytes_max: int
    ) -> None:
        """`layout` is this worker's; at most `bytes_max` are on their way at one time, or one block."""
        assert len(held.blocks) == len(target)
        self._connection, self._layers = connection, layout.layers
        self._source, self._target = held.blocks, target
        self._digests = held.digests or (0,) * len(target)
        self._group_blocks = max(1, min(GROUP_BYTES_MAX, bytes_max) // layout.block_bytes)
        self._told = 0
        self._again: asyncio.Queue[int] = asyncio.Queue()
        self._resends_left = RESENDS_MAX * len(target)

    async def send(self, tell: Tell) -> None:
        """All of them; tells of each group when it has landed. Raises TransferError."""
        for begin in range(0, len(self._target), self._group_blocks):
            end = min(begin + self._group_blocks, len(self._target))
            await self._send(range(begin, end), tell)

    async def send_again(self, tell: Tell) -> None:
        """Those that did not match where they landed, as they are asked for; until cancelled."""
        while True:
            wanted = {await self._again.get()}
            while len(wanted) < self._group_blocks and not self._again.empty():
                wanted.add(self._again.get_nowait())
            await self._send(sorted(wanted), tell)

    def ask_again(self, indices: Sequence[int]) -> None:
        """Raises InvalidRequest for blocks that were not told to have landed, or if it is asked too often."""
        self._resends_left -= len(indices)
        if self._resends_left < 0 or any(index >= self._told for index in indices):
            raise InvalidRequest("Blocks were asked for again that had not landed, or too often.", "indices")
        for index in indices:
            self._again.put_nowait(index)

    async def _send(self, indices: Sequence[int], tell: Tell) -> None:
        source = [self._source[index] for index in indices]
        target = [self._target[index] for index in indices]
        for layer in range(self._layers):
            await _unless_stalled(self._connection.write(layer, source, target))
        await _unless_stalled(self._connection.fence())
        self._told = max(self._told, indices[-1] + 1)
        for run in _runs(indices):
            await tell(transfer_pb2.BlocksLanded(first=run.start, digests=self._digests[run.start : run.stop]))


def _runs(indices: Sequence[int]) -> Iterable[range]:
    """Of ascending numbers, those that follow each other together."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(indices), 1) if b - a > 1), len(indices)]
    return (range(indices[begin], indices[end - 1] + 1) for begin, end in pairwise(cuts))


async def _unless_stalled(operation: Coroutine[object, object, None]) -> None:
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            await operation
    except TimeoutError:
        raise TransferError(f"The link moved nothing for {STALL_TIMEOUT_S:g} s.") from None
