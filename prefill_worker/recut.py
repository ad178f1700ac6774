"""Between the engine and a job whose decode worker has KV blocks of another size."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from baton.clock import Clock
from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from engine.interface import Admitted, BlocksDigested, BlocksWritten, Failed, Generated
from kvtransfer.interface import Region
from kvtransfer.reblocked import Reblocked
from prefill_worker.job import PrefillJob

log = logging.getLogger(__name__)

DIGEST_BYTES_MAX = 16 * 2**20
"""In one go, and at least one block: those that are done are told while the next are digested."""


class Recut:
    """Takes the engine's events, which speak of this worker's blocks, and feeds the job with the same in the decode
    worker's: its source is the prompt's KV as such blocks (kvtransfer/reblocked.py), of which those are final whose
    tokens all are.

    The engine's digests are of its own blocks, so others are made here, of what is sent. The source is compared with
    the engine's afterwards: what was wrong by then is not told, so an error is caught from where a block was computed
    to where it is used, as it is between equal blocks.
    """

    def __init__(
        self, job: PrefillJob, region: Region, target: KVLayout, tokens: int, first_block: int, clock: Clock
    ) -> None:
        """`first_block` is the first of the decode worker's blocks that the job sends."""
        self._job, self._region, self._target, self._clock = job, region, target, clock
        self._tokens, self._told = tokens, first_block
        self._blocks: Sequence[BlockId] = ()
        self._digests: list[int] = []
        """The engine's, of the leading blocks here."""
        self._digesting: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self._generated: tuple[Generated, float] | None = None
        self._has_failed = False

    # ---- from the engine

    def admitted(self, event: Admitted) -> None:
        self._blocks = event.blocks
        self._reblocked = Reblocked(self._region, event.blocks, self._tokens, self._target)
        try:
            self._job.connection.read_from(self._reblocked)
        except TransferError as error:
            self.failed(Failed(event.request_id, error))
            return
        blocks = tuple(map(BlockId, range(self._reblocked.layout.blocks)))
        self._job.admitted(replace(event, blocks=blocks, digests=()))
        self.digested(BlocksDigested(event.request_id, 0, event.digests))

    def written(self, layer: int, event: BlocksWritten) -> None:
        self._job.written(layer, replace(event, first=self._filled(event.first), end=self._filled(event.end)))

    def digested(self, event: BlocksDigested) -> None:
        if event.digests and not self._has_failed:
            assert event.first == len(self._digests)
            self._digests += event.digests
            self._more.set()
            self._digesting = self._digesting or asyncio.create_task(self._digest())

    def generated(self, event: Generated) -> None:
        """Passed on after the digests, which the job expects before it."""
        self._generated = event, self._clock()
        if self._digesting is None or self._digesting.done():
            self._pass_on()

    def failed(self, event: Failed) -> None:
        self._has_failed = True
        self._job.failed(event)

    def _pass_on(self) -> None:
        if self._generated is not None and not self._has_failed:
            event, at_s = self._generated
            self._job.generated(event, at_s)

    def _filled(self, blocks: int) -> int:
        """How many of the decode worker's blocks are final when so many here are."""
        tokens = blocks * self._region.layout.block_tokens
        return self._target.blocks_for(self._tokens) if tokens >= self._tokens else tokens // self._target.block_tokens

    # ---- digests

    async def _digest(self) -> None:
        """Until every block is digested."""
        try:
            while self._told < self._target.blocks_for(self._tokens):
                await self._more.wait()
                self._more.clear()
                await self._digest_final()
        except TransferError as error:
            self.failed(Failed(self._job.request_id, error))
        except Exception as error:  # a device's library may fail in any way
            log.warning("request %s: blocks could not be digested", self._job.request_id, exc_info=True)
            reason = f"Its KV blocks could not be digested ({type(error).__name__})."
            self.failed(Failed(self._job.request_id, TransferError(reason)))
        self._pass_on()

    async def _digest_final(self) -> None:
        """Those whose tokens are all in blocks that the engine has digested."""
        blocks_max = max(1, DIGEST_BYTES_MAX // self._target.block_bytes)
        while self._told < (final := self._filled(len(self._digests))):
            first, end = self._told, min(self._told + blocks_max, final)
            digests = await asyncio.to_thread(self._digests_of, first, end)
            self._told = end
            self._job.digested(BlocksDigested(self._job.request_id, first, digests))

    def _digests_of(self, first: int, end: int) -> tuple[int, ...]:
        """In a thread."""
        digests = self._reblocked.digests([BlockId(block) for block in range(first, end)])
        first_token, end_token = (min(block * self._target.block_tokens, self._tokens) for block in (first, end))
        own = self._reblocked.source_blocks(first_token, end_token)
        if list(self._region.digests(self._blocks[own])) != self._digests[own]:
            raise TransferError("A KV block of the prefill worker is not any more what was computed.")
        return tuple(digests)

    async def close(self) -> None:
        """After it nothing more is told; a thread may read the blocks for a moment still, which harms nobody."""
        if self._digesting is not None:
            self._digesting.cancel()
            await asyncio.gather(self._digesting, return_exceptions=True)
