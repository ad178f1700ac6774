"""Which slices a ticket's job sends, and when: the engine's events go in, writes come out."""

import asyncio
from collections.abc import Sequence

import pytest

from baton.clock import ManualClock
from baton.errors import Overloaded, TransferError
from baton.ids import BlockId, RequestId
from baton.rpc import worker_pb2
from engine.interface import Admitted, BlocksWritten, Failed, Generated
from prefill_worker.job import PrefillJob

ID = RequestId("r/0")


class RecordingConnection:
    transport = "recording"
    bytes_written = 0
    busy_s = 0.0

    def __init__(self, error: TransferError | None = None) -> None:
        self.writes: list[tuple[int, list[int], list[int]]] = []
        self.fenced = False
        self._error = error

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        if self._error:
            raise self._error
        self.writes.append((layer, list(source), list(target)))

    async def fence(self) -> None:
        self.fenced = True

    async def close(self) -> None: ...


def ticket(first_block: int, target: list[int], layers: int = 2) -> worker_pb2.Ticket:
    layout = worker_pb2.KVLayout(layers=layers, block_tokens=4)
    return worker_pb2.Ticket(request_id="r", layout=layout, first_block=first_block, blocks=target)


def test_sends_each_layer_of_each_chunk_once_and_only_what_is_missing() -> None:
    async def run() -> None:
        connection = RecordingConnection()
        # Four blocks of prompt; the decode worker has the first and offers 70, 71, 72 for the others.
        job = PrefillJob(ID, ticket(1, [70, 71, 72]), connection, ManualClock())
        job.admitted(Admitted(ID, (BlockId(10), BlockId(11), BlockId(12), BlockId(13)), cached_tokens=8))
        sending = asyncio.ensure_future(job.send())
        await asyncio.sleep(0)
        assert connection.writes == [(0, [11], [70]), (1, [11], [70])], "what this worker had cached goes at once"
        job.written(0, BlocksWritten(ID, 2, 4))
        await asyncio.sleep(0)
        assert connection.writes[2:] == [(0, [12, 13], [71, 72])], "a layer leaves before the next is computed"
        assert not connection.fenced
        job.written(1, BlocksWritten(ID, 2, 4))
        await sending
        assert connection.writes[3:] == [(1, [12, 13], [71, 72])]
        assert connection.fenced

    asyncio.run(run())


def test_nothing_to_send_when_the_decode_worker_has_all_blocks() -> None:
    async def run() -> None:
        connection = RecordingConnection()
        job = PrefillJob(ID, ticket(1, []), connection, ManualClock())
        job.admitted(Admitted(ID, (BlockId(0),), cached_tokens=0))
        job.written(0, BlocksWritten(ID, 0, 1))
        await job.send()
        assert connection.writes == []

    asyncio.run(run())


def test_the_timeline_separates_hidden_from_exposed_transfer() -> None:
    async def run() -> None:
        clock = ManualClock()
        connection = RecordingConnection()
        job = PrefillJob(ID, ticket(0, [5], layers=1), connection, clock)
        clock.advance(1)
        job.admitted(Admitted(ID, (BlockId(0),), cached_tokens=0))
        clock.advance(2)
        job.generated(Generated(ID, (42,)))
        clock.advance(0.5)
        job.written(0, BlocksWritten(ID, 0, 1))
        await job.send()
        commit = await job.commit()
        assert (await job.started()).queue_s == 1
        assert (commit.first_token, commit.prefill_s, commit.transfer_exposed_s) == (42, 2, 0.5)
        assert not commit.HasField("logprobs")

    asyncio.run(run())


@pytest.mark.parametrize("admitted_first", [False, True])
def test_the_engines_failure_ends_the_job(admitted_first: bool) -> None:
    async def run() -> None:
        job = PrefillJob(ID, ticket(0, [5]), RecordingConnection(), ManualClock())
        if admitted_first:
            job.admitted(Admitted(ID, (BlockId(0),), cached_tokens=0))
        sending = asyncio.ensure_future(job.send())
        await asyncio.sleep(0)
        job.failed(Failed(ID, Overloaded("Out of memory.")))
        with pytest.raises(Overloaded):
            await sending

    asyncio.run(run())


def test_a_broken_link_ends_the_job() -> None:
    async def run() -> None:
        job = PrefillJob(ID, ticket(0, [5]), RecordingConnection(TransferError("gone")), ManualClock())
        job.admitted(Admitted(ID, (BlockId(0),), cached_tokens=0))
        job.written(0, BlocksWritten(ID, 0, 1))
        with pytest.raises(TransferError):
            await job.send()

    asyncio.run(run())
