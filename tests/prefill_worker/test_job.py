"""Which slices a ticket's job sends, and when: the engine's events go in, writes come out."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from baton.clock import ManualClock
from baton.errors import InvalidRequest, Overloaded, TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.convert import layout_to_proto
from engine.interface import Admitted, BlocksDigested, BlocksWritten, Failed, Generated
from engine.worker.prefetch import Prefetched
from prefill_worker import job as job_module
from prefill_worker.job import PrefillJob, Sending

ID = RequestId("r/0")
STREAMED = Sending(bytes_in_flight_max=2**30)


def layout_of(layers: int) -> KVLayout:
    return KVLayout(layers=layers, blocks=100, block_tokens=4, kv_heads=1, head_dim=2, dtype="float32")


BLOCK_BYTES = 2 * layout_of(1).slice_bytes


class RecordingConnection:
    transport = "recording"
    bytes_written = 0
    busy_s = 0.0

    def __init__(self, error: TransferError | None = None) -> None:
        self.writes: list[tuple[int, list[int], list[int]]] = []
        self.log: list[str] = []
        self.fences = 0
        self._error = error

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        if self._error:
            raise self._error
        self.writes.append((layer, list(source), list(target)))
        self.log.append("write")

    async def fence(self) -> None:
        self.fences += 1
        self.log.append("fence")

    async def close(self) -> None: ...


class Rig:
    """A job of four blocks, of which the decode worker has the first and wants the others in 71, 72, 73."""

    def __init__(self, layers: int = 2, sending: Sending = STREAMED, connection: Any = None) -> None:
        self.clock = ManualClock()
        self.connection = connection or RecordingConnection()
        self.told: list[tuple[int, list[int]]] = []
        layout = layout_of(layers)
        ticket = worker_pb2.Ticket(
            request_id="r", layout=layout_to_proto(layout), first_block=1, blocks=[BlockId(b) for b in (71, 72, 73)]
        )
        self.job = PrefillJob(ID, ticket, self.connection, sending, self.clock)

    def admit(self, cached_tokens: int = 0, digests: tuple[int, ...] = (), restoring_tokens: int = 0) -> None:
        blocks = tuple(map(BlockId, (10, 11, 12, 13)))
        self.job.admitted(Admitted(ID, blocks, cached_tokens, digests, restoring_tokens))

    def generate(self) -> None:
        self.job.generated(Generated(ID, (42,)))

    async def tell(self, landed: transfer_pb2.BlocksLanded) -> None:
        self.told.append((landed.first, list(landed.digests)))

    def send(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.job.send(self.tell))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


async def let_it_work() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_sends_each_layer_of_each_chunk_once_and_only_what_is_missing_and_tells_when_it_landed() -> None:
    async def test() -> None:
        rig = Rig()
        job, connection = rig.job, rig.connection
        rig.admit(cached_tokens=8, digests=(100, 101))
        sending = rig.send()
        await let_it_work()
        assert connection.writes == [(0, [11], [71]), (1, [11], [71])], "what this worker had cached goes at once"
        assert rig.told == [(0, [101])], "and is told while the rest is computed"
        job.written(0, BlocksWritten(ID, 2, 4))
        await let_it_work()
        assert connection.writes[2:] == [(0, [12, 13], [72, 73])], "a layer leaves before the next is computed"
        assert connection.fences == 1
        job.written(1, BlocksWritten(ID, 2, 4))
        await let_it_work()
        assert connection.writes[3:] == [(1, [12, 13], [72, 73])]
        assert connection.fences == 2
        assert rig.told == [(0, [101])], "the digests are not known yet"
        job.digested(BlocksDigested(ID, 2, (102, 103)))
        await let_it_work()
        assert rig.told == [(0, [101]), (1, [102, 103])]
        assert not sending.done(), "the first token is missing"
        rig.generate()
        await sending
        assert rig.told == [(0, [101]), (1, [102, 103])]

    run(test)


def test_blocks_that_are_still_being_restored_are_sent_as_they_come() -> None:
    async def test() -> None:
        rig = Rig()
        job, connection = rig.job, rig.connection
        rig.admit(cached_tokens=16, digests=(100, 101), restoring_tokens=8)
        sending = rig.send()
        await let_it_work()
        assert connection.writes == [(0, [11], [71]), (1, [11], [71])], "the others are not here yet"
        for layer in (0, 1):
            job.written(layer, BlocksWritten(ID, 2, 4))
        await let_it_work()
        assert connection.writes[2:] == [(0, [12, 13], [72, 73]), (1, [12, 13], [72, 73])]
        assert rig.told == [(0, [101])], "they are not verified yet"
        job.digested(BlocksDigested(ID, 2, (102, 103)))
        job.generated(Generated(ID, (42,), restored_tokens=8, restore_s=0.25))
        await sending
        assert rig.told == [(0, [101]), (1, [102, 103])]
        assert (await job.started()).cached_tokens == 16
        assert (job.commit().restored_tokens, job.commit().restore_s) == (8, 0.25)

    run(test)


def test_what_was_fetched_before_is_told_apart_from_the_queue() -> None:
    async def test() -> None:
        rig = Rig()
        rig.clock.advance(3.0)
        rig.job.prefetched(Prefetched(tokens=8, seconds=2.0))
        rig.admit(cached_tokens=8, digests=(100, 101))
        started = await rig.job.started()
        assert (started.fetched_tokens, started.fetch_s, started.queue_s) == (8, 2.0, 1.0)

    run(test)


def test_an_engine_without_digests_tells_zeros() -> None:
    async def test() -> None:
        rig = Rig(sending=Sending(bytes_in_flight_max=2**30, makes_digests=False))
        rig.admit(cached_tokens=16)
        rig.generate()
        await rig.send()
        assert rig.told == [(0, [0, 0, 0])]

    run(test)


def test_sent_after_prefill_nothing_leaves_before_the_first_token() -> None:
    async def test() -> None:
        rig = Rig(sending=Sending(bytes_in_flight_max=2**30, after_prefill=True))
        rig.admit(cached_tokens=8, digests=(100, 101))
        sending = rig.send()
        for layer in (0, 1):
            rig.job.written(layer, BlocksWritten(ID, 2, 4))
        rig.job.digested(BlocksDigested(ID, 2, (102, 103)))
        await let_it_work()
        assert rig.connection.writes == []
        rig.generate()
        await sending
        assert rig.connection.writes == [(0, [11, 12, 13], [71, 72, 73]), (1, [11, 12, 13], [71, 72, 73])]

    run(test)


@pytest.mark.parametrize(
    ("blocks_in_flight", "log"),
    [
        (1, ["write", "fence"] * 6),
        (2, ["write", "fence", "write", "fence", "write", "write", "fence"]),
        (3, ["write", "fence", "write", "fence"]),
        (6, ["write", "write", "fence"]),
    ],
)
def test_bytes_in_flight_are_bounded(blocks_in_flight: int, log: list[str]) -> None:
    async def test() -> None:
        rig = Rig(sending=Sending(bytes_in_flight_max=blocks_in_flight * BLOCK_BYTES))
        rig.admit(cached_tokens=16, digests=(100, 101, 102, 103))
        rig.generate()
        await rig.send()
        assert rig.connection.log == log
        assert sorted(block for _, blocks in rig.told for block in blocks) == [101, 102, 103]

    run(test)


def test_blocks_are_sent_again_before_and_after_the_rest_is_done() -> None:
    async def test() -> None:
        rig = Rig()
        rig.admit(cached_tokens=8, digests=(100, 101))
        sending = rig.send()
        await let_it_work()
        rig.job.resend([0])
        await let_it_work()
        assert rig.connection.writes == [(0, [11], [71]), (1, [11], [71])] * 2
        assert rig.told == [(0, [101])] * 2
        for layer in (0, 1):
            rig.job.written(layer, BlocksWritten(ID, 2, 4))
        rig.job.digested(BlocksDigested(ID, 2, (102, 103)))
        rig.generate()
        await sending
        again = asyncio.create_task(rig.job.send_again(rig.tell))
        rig.job.resend([0, 2])
        await let_it_work()
        assert rig.connection.writes[-2:] == [(0, [11, 13], [71, 73]), (1, [11, 13], [71, 73])]
        assert rig.told[-2:] == [(0, [101]), (2, [103])]
        assert rig.connection.log[-1] == "fence"
        again.cancel()

    run(test)


def test_nobody_asks_again_for_what_has_not_landed_or_without_end() -> None:
    async def test() -> None:
        rig = Rig()
        rig.admit(cached_tokens=8, digests=(100, 101))
        sending = rig.send()
        await let_it_work()
        with pytest.raises(InvalidRequest, match="had not landed"):
            rig.job.resend([1])
        for _ in range(6):
            rig.job.resend([0])
        with pytest.raises(InvalidRequest, match="more than"):
            rig.job.resend([0])
        sending.cancel()

    run(test)


def test_nothing_to_send_when_the_decode_worker_has_all_blocks() -> None:
    async def test() -> None:
        connection = RecordingConnection()
        layout = layout_of(2)
        ticket = worker_pb2.Ticket(request_id="r", layout=layout_to_proto(layout), first_block=1)
        job = PrefillJob(ID, ticket, connection, STREAMED, ManualClock())
        job.admitted(Admitted(ID, (BlockId(0),), cached_tokens=0))
        job.written(0, BlocksWritten(ID, 0, 1))
        job.generated(Generated(ID, (42,)))
        await job.send(Rig().tell)
        assert connection.writes == []

    run(test)


def test_the_timeline_separates_hidden_from_exposed_transfer() -> None:
    async def test() -> None:
        rig = Rig(layers=1)
        rig.clock.advance(1)
        rig.admit(digests=())
        rig.clock.advance(2)
        rig.job.digested(BlocksDigested(ID, 0, (1, 2, 3, 4)))
        rig.job.written(0, BlocksWritten(ID, 0, 4))
        rig.generate()
        rig.clock.advance(0.5)
        await rig.send()
        rig.connection.busy_s = 2.0
        commit = rig.job.commit()
        assert (await rig.job.started()).queue_s == 1
        assert (commit.first_token, commit.blocks, commit.prefill_s, commit.transfer_exposed_s) == (42, 3, 2, 0.5)
        assert (rig.job.times.busy_s, rig.job.times.hidden_s) == (2.0, 1.5)
        assert not commit.HasField("logprobs")

    run(test)


@pytest.mark.parametrize("admitted_first", [False, True])
def test_the_engines_failure_ends_the_job(admitted_first: bool) -> None:
    async def test() -> None:
        rig = Rig()
        if admitted_first:
            rig.admit()
        sending = rig.send()
        await let_it_work()
        rig.job.failed(Failed(ID, Overloaded("Out of memory.")))
        with pytest.raises(Overloaded):
            await sending

    run(test)


def test_a_broken_link_ends_the_job() -> None:
    async def test() -> None:
        rig = Rig(connection=RecordingConnection(TransferError("gone")))
        rig.admit(cached_tokens=16, digests=(1, 2, 3, 4))
        with pytest.raises(TransferError, match="gone"):
            await rig.send()

    run(test)


@pytest.mark.parametrize("where", ["write", "fence"])
def test_a_stalled_link_ends_the_job(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "STALL_TIMEOUT_S", 0.05)

    class Stalled(RecordingConnection):
        async def write(self, *arguments: Any) -> None:
            await super().write(*arguments)
            if where == "write":
                await asyncio.Event().wait()

        async def fence(self) -> None:
            await asyncio.Event().wait()

    async def test() -> None:
        rig = Rig(connection=Stalled())
        rig.admit(cached_tokens=16, digests=(1, 2, 3, 4))
        with pytest.raises(TransferError, match="moved nothing"):
            await rig.send()

    run(test)
