"""What a job is told whose decode worker has blocks of another size."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.clock import ManualClock
from baton.errors import Overloaded, TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.convert import layout_to_proto
from engine.interface import Admitted, BlocksDigested, BlocksWritten, Failed, Generated
from kvtransfer.interface import Source
from kvtransfer.region import HostRegion
from prefill_worker.job import PrefillJob, Sending
from prefill_worker.recut import Recut
from tests.prefill_worker.test_job import RecordingConnection

ID = RequestId("r/0")
LAYOUT = KVLayout(layers=2, blocks=20, block_tokens=4, kv_heads=1, head_dim=2, dtype="float32")
BLOCKS = tuple(map(BlockId, (11, 3, 4, 5, 9)))
FIRST_TARGET = 70


class Connection(RecordingConnection):
    """Which reads from what it is told."""

    source: Source | None = None
    refusal = ""

    def read_from(self, source: Source) -> None:
        if self.refusal:
            raise TransferError(self.refusal)
        self.source = source

    @property
    def sent(self) -> list[tuple[int, list[int]]]:
        """Layer and source blocks of each write."""
        return [(layer, source) for layer, source, _ in self.writes]


class Rig:
    """A prompt of 18 tokens in five blocks of four here, wanted from block `first_block` on in blocks of
    `target_tokens`."""

    def __init__(
        self, target_tokens: int = 6, first_block: int = 0, tokens: int = 18, makes_digests: bool = True
    ) -> None:
        self.region, self.clock, self.connection = HostRegion.allocate(LAYOUT), ManualClock(), Connection()
        np.frombuffer(self.region.memory, np.uint8)[:] = np.random.default_rng(1).integers(
            0, 256, LAYOUT.region_bytes, np.uint8
        )
        target = replace(LAYOUT, blocks=99, block_tokens=target_tokens)
        self.blocks = target.blocks_for(tokens) - first_block
        ticket = worker_pb2.Ticket(
            request_id="r",
            layout=layout_to_proto(target),
            first_block=first_block,
            blocks=range(FIRST_TARGET, FIRST_TARGET + self.blocks),
        )
        sending = Sending(2**30, makes_digests=makes_digests)
        self.job = PrefillJob(ID, ticket, self.connection, sending, self.clock)
        self.recut = Recut(self.job, self.region, target, tokens, first_block, self.clock)
        self.told: list[tuple[int, list[int]]] = []

    def digests(self, first: int, end: int) -> tuple[int, ...]:
        """As the engine made them."""
        return tuple(self.region.digests(BLOCKS[first:end]))

    def admit(self, cached: int = 0) -> None:
        self.recut.admitted(Admitted(ID, BLOCKS, 4 * cached, self.digests(0, cached)))

    def write(self, first: int, end: int) -> None:
        for layer in range(LAYOUT.layers):
            self.recut.written(layer, BlocksWritten(ID, first, end))

    def digest(self, first: int, end: int) -> None:
        self.recut.digested(BlocksDigested(ID, first, self.digests(first, end)))

    def generate(self) -> None:
        self.recut.generated(Generated(ID, (42,)))

    async def tell(self, landed: transfer_pb2.BlocksLanded) -> None:
        self.told.append((landed.first, list(landed.digests)))

    async def until_told(self, blocks: int) -> None:
        while sum(len(digests) for _, digests in self.told) < blocks:  # noqa: ASYNC110 - threads tell the loop
            await asyncio.sleep(0)

    def expected(self) -> list[int]:
        assert self.connection.source is not None
        blocks = self.connection.source.layout.blocks
        return list(self.connection.source.digests([BlockId(b) for b in range(blocks - self.blocks, blocks)]))


def run(test: Callable[[Rig], Awaitable[None]], rig: Callable[[], Rig] = Rig) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            made = rig()
            try:
                await test(made)
            finally:
                await made.recut.close()
                made.region.close()

    asyncio.run(main())


def test_what_is_final_is_sent_in_the_receivers_blocks_and_told_with_their_digests() -> None:
    async def test(rig: Rig) -> None:
        rig.admit(cached=1)
        sending = asyncio.create_task(rig.job.send(rig.tell))
        rig.write(1, 2)  # 8 tokens: block 0 and a part of 1
        rig.digest(1, 2)
        await rig.until_told(1)
        assert rig.connection.sent == [(0, [0]), (1, [0])]
        rig.write(2, 5)
        rig.digest(2, 5)
        await rig.until_told(3)
        assert rig.connection.sent[2:] == [(0, [1, 2]), (1, [1, 2])]
        rig.generate()
        await sending
        assert rig.connection.writes[-1][2] == [71, 72]
        assert [digest for _, digests in rig.told for digest in digests] == rig.expected()
        assert rig.job.commit().first_token == 42

    run(test)


@given(st.data(), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_whatever_the_sizes_and_steps_every_block_is_sent_and_told_once(
    data: st.DataObject, target_tokens: int, tokens: int, makes_digests: bool
) -> None:
    own_blocks = -(-tokens // 4)
    first_block = data.draw(st.integers(0, -(-tokens // target_tokens)))
    ends = sorted({*data.draw(st.lists(st.integers(1, own_blocks))), own_blocks})
    cached = data.draw(st.integers(0, min(ends[0], (tokens - 1) // 4)))

    async def test(rig: Rig) -> None:
        digests = rig.digests(0, cached) if makes_digests else ()
        rig.recut.admitted(Admitted(ID, BLOCKS[:own_blocks], 4 * cached, digests))
        sending = asyncio.create_task(rig.job.send(rig.tell))
        done = cached
        for end in ends:
            rig.write(done, end)
            await asyncio.sleep(0)
            if makes_digests:
                rig.digest(done, end)
            done = end
        rig.generate()
        await sending
        for layer in range(LAYOUT.layers):
            sent = [block for at, blocks in rig.connection.sent if at == layer for block in blocks]
            assert sent == list(range(first_block, first_block + rig.blocks))
        told = [digest for _, told in rig.told for digest in told]
        assert told == (rig.expected() if makes_digests else [0] * rig.blocks)

    run(test, lambda: Rig(target_tokens, first_block, tokens, makes_digests))


def test_what_the_decode_worker_has_is_neither_sent_nor_digested(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        rig.admit()
        told, digests, digested = rig.digests(0, 5), rig.region.digests, list[BlockId]()

        def watched(blocks: Sequence[BlockId]) -> Sequence[int]:
            digested.extend(blocks)
            return digests(blocks)

        monkeypatch.setattr(rig.region, "digests", watched)
        rig.write(0, 5)
        rig.recut.digested(BlocksDigested(ID, 0, told))
        rig.generate()
        await rig.job.send(rig.tell)
        assert rig.connection.sent == [(0, [2]), (1, [2])]
        assert digested == [BLOCKS[3], BLOCKS[4]], "where tokens 12 to 17 lie"

    run(test, lambda: Rig(first_block=2))


def test_the_first_token_counts_from_when_it_was_drawn() -> None:
    async def test(rig: Rig) -> None:
        rig.admit()
        rig.clock.advance(2)
        rig.write(0, 5)
        rig.digest(0, 5)
        rig.generate()
        rig.clock.advance(5)
        await rig.job.send(rig.tell)
        assert rig.job.commit().prefill_s == 2

    run(test)


@pytest.mark.parametrize("block", range(5))
def test_a_block_that_changed_since_the_engine_made_its_digest_is_not_told(block: int) -> None:
    async def test(rig: Rig) -> None:
        rig.admit()
        told = rig.digests(0, 5)
        rig.region.writable(1, 0, BLOCKS[block], 1)[0] ^= 1
        rig.write(0, 5)
        rig.recut.digested(BlocksDigested(ID, 0, told))
        rig.generate()
        with pytest.raises(TransferError, match="not any more what was computed"):
            await rig.job.send(rig.tell)
        assert rig.told == []

    run(test)


def test_a_region_that_fails_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(blocks: Sequence[BlockId]) -> Sequence[int]:
        raise RuntimeError(f"{len(blocks)} blocks are gone")

    async def test(rig: Rig) -> None:
        rig.admit()
        rig.digest(0, 5)
        monkeypatch.setattr(rig.region, "digests", broken)
        rig.write(0, 5)
        rig.generate()
        with pytest.raises(TransferError, match=r"could not be digested \(RuntimeError\)"):
            await rig.job.send(rig.tell)

    run(test)


def test_a_connection_that_reads_nothing_else_ends_the_job() -> None:
    async def test(rig: Rig) -> None:
        rig.connection.refusal = "It moves blocks as they lie."
        rig.admit(cached=1)
        rig.write(1, 5)
        rig.digest(1, 5)
        rig.generate()
        with pytest.raises(TransferError, match="as they lie"):
            await rig.job.started()

    run(test)


def test_the_engines_failure_ends_the_job() -> None:
    async def test(rig: Rig) -> None:
        rig.admit()
        sending = asyncio.create_task(rig.job.send(rig.tell))
        rig.write(0, 2)
        rig.digest(0, 2)
        rig.recut.failed(Failed(ID, Overloaded("Out of memory.")))
        with pytest.raises(Overloaded):
            await sending

    run(test)


def test_closed_in_the_middle_nothing_more_is_told() -> None:
    async def test(rig: Rig) -> None:
        rig.admit()
        rig.write(0, 5)
        rig.digest(0, 5)
        rig.generate()
        await asyncio.sleep(0)
        await rig.recut.close()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await rig.job.send(rig.tell)
        assert rig.told == []

    run(test)
