"""Each way a ticket's stream ends: what the decode worker is told, and that the job is closed, once."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio
import pytest

from baton.clock import ManualClock
from baton.errors import Overloaded, TransferError, Unauthorized
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2, worker_pb2, worker_pb2_grpc
from baton.rpc.convert import layout_to_proto
from engine.interface import Admitted, Generated
from prefill_worker.job import PrefillJob, Sending
from prefill_worker.servicer import PrefillServicer

ID = RequestId("r/0")
LAYOUT = KVLayout(layers=1, blocks=10, block_tokens=4, kv_heads=1, head_dim=2, dtype="float32")
TICKET = worker_pb2.Ticket(request_id="r", layout=layout_to_proto(LAYOUT), blocks=[5, 6])
HELLO = worker_pb2.PrefillRequest(ticket=TICKET)


class Connection:
    transport = "fake"
    bytes_written = 0
    busy_s = 0.0

    def __init__(self) -> None:
        self.error: TransferError | None = None
        self.targets: list[list[int]] = []

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        del layer, source
        if self.error:
            raise self.error
        self.targets.append(list(target))

    async def fence(self) -> None: ...

    async def close(self) -> None: ...


class OneJob:
    """Whose prompt is in the prefix cache, so that only `generate` is missing."""

    def __init__(self) -> None:
        self.connection = Connection()
        self.refusal: Unauthorized | None = None
        self.refusal_later: Overloaded | None = None
        self.beginning = asyncio.Event()
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.closed = asyncio.Event()
        self.closings = 0
        self.deadline_s = 10.0

    async def open_job(self, ticket: worker_pb2.Ticket) -> PrefillJob:
        if self.refusal:
            raise self.refusal
        self.job = PrefillJob(ID, ticket, self.connection, Sending(2**20), ManualClock())
        return self.job

    async def begin_job(self, job: PrefillJob, ticket: worker_pb2.Ticket) -> None:
        assert job is self.job and ticket == TICKET
        self.beginning.set()
        await self.may_begin.wait()
        if self.refusal_later:
            raise self.refusal_later
        job.admitted(Admitted(ID, (BlockId(1), BlockId(2)), 8, (100, 200)))

    def generate(self) -> None:
        self.job.generated(Generated(ID, (7,)))

    async def close_job(self, job: PrefillJob) -> None:
        assert job is self.job
        self.closings += 1
        self.closed.set()

    def timeout_s(self, ticket: worker_pb2.Ticket) -> float:
        del ticket
        return self.deadline_s


Call = Any
Test = Callable[[OneJob, Call], Awaitable[None]]


def run(test: Test) -> None:
    async def main() -> None:
        jobs = OneJob()
        server = grpc.aio.server()
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(PrefillServicer(jobs), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = worker_pb2_grpc.PrefillWorkerStub(channel).Prefill()
                async with asyncio.timeout(60):
                    await test(jobs, call)
                call.cancel()
        finally:
            await server.stop(0)
        assert jobs.closings <= 1

    asyncio.run(main())


async def messages(call: Call, count: int) -> list[str]:
    return [(await call.read()).WhichOneof("message") for _ in range(count)]


async def fails(call: Call, code: grpc.StatusCode, words: str) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:  # the status comes after the last message
            pass
    assert await call.code() is code
    assert words in await call.details()


def resend(*indices: int) -> worker_pb2.PrefillRequest:
    return worker_pb2.PrefillRequest(resend=transfer_pb2.ResendBlocks(indices=indices))


def test_the_decode_worker_has_all_and_ends_its_side() -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        await call.write(HELLO)
        assert await messages(call, 2) == ["started", "landed"]
        jobs.generate()
        assert await messages(call, 1) == ["commit"]
        assert not jobs.closed.is_set(), "it may still ask for blocks again"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert jobs.closed.is_set()
        assert jobs.job.is_committed

    run(test)


@pytest.mark.parametrize("committed", [False, True])
def test_blocks_are_sent_again_when_asked_for(committed: bool) -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        await call.write(HELLO)
        await messages(call, 2)
        if committed:
            jobs.generate()
            await messages(call, 1)
        await call.write(resend(1))
        landed = (await call.read()).landed
        assert (landed.first, list(landed.digests)) == (1, [200])
        assert jobs.connection.targets == [[5, 6], [6]]
        if not committed:
            jobs.generate()
            assert await messages(call, 1) == ["commit"]

    run(test)


def test_a_ticket_taken_back() -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        await call.write(HELLO)
        await messages(call, 2)
        await call.write(worker_pb2.PrefillRequest(cancel=worker_pb2.PrefillCancel()))
        assert await messages(call, 1) == ["released"]
        assert jobs.closed.is_set()
        assert not jobs.job.is_committed

    run(test)


@pytest.mark.parametrize("committed", [False, True])
def test_a_decode_worker_that_hangs_up_or_dies(committed: bool) -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        await call.write(HELLO)
        await messages(call, 2)
        if committed:
            jobs.generate()
            await messages(call, 1)
        call.cancel()
        await jobs.closed.wait()

    run(test)


@pytest.mark.parametrize("end", ["taken back", "hung up", "deadline"])
def test_a_ticket_that_ends_while_its_prefix_is_fetched(end: str) -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        jobs.may_begin.clear()
        if end == "deadline":
            jobs.deadline_s = 0.5
        await call.write(HELLO)
        await jobs.beginning.wait()
        match end:
            case "taken back":
                await call.write(worker_pb2.PrefillRequest(cancel=worker_pb2.PrefillCancel()))
                assert await messages(call, 1) == ["released"]
            case "hung up":
                call.cancel()
            case _:
                await fails(call, grpc.StatusCode.DEADLINE_EXCEEDED, "0.5 s")
        await jobs.closed.wait()

    run(test)


def test_an_engine_that_takes_no_more() -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        jobs.refusal_later = Overloaded("The queue is full.")
        await call.write(HELLO)
        await fails(call, grpc.StatusCode.RESOURCE_EXHAUSTED, "The queue is full.")
        assert jobs.closed.is_set()

    run(test)


def test_a_deadline_that_passes() -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        jobs.deadline_s = 0.05
        await call.write(HELLO)
        await fails(call, grpc.StatusCode.DEADLINE_EXCEEDED, "0.05 s")
        assert jobs.closed.is_set()

    run(test)


def test_a_transfer_that_fails() -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        jobs.connection.error = TransferError("The cable is cut.")
        await call.write(HELLO)
        await fails(call, grpc.StatusCode.UNAVAILABLE, "The cable is cut.")
        assert jobs.closed.is_set()

    run(test)


def test_a_ticket_that_is_refused() -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        jobs.refusal = Unauthorized("Not signed.")
        await call.write(HELLO)
        await fails(call, grpc.StatusCode.UNAUTHENTICATED, "Not signed.")

    run(test)


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([resend(0)], "must be a ticket"),
        ([HELLO, HELLO], "has one ticket"),
        ([HELLO, resend(2)], "had not landed"),
        ([HELLO, resend(0, 0, 0, 0, 0)], "more than 2 times"),
    ],
)
def test_what_no_decode_worker_says(requests: Sequence[worker_pb2.PrefillRequest], words: str) -> None:
    async def test(jobs: OneJob, call: Call) -> None:
        del jobs
        await call.write(requests[0])
        if len(requests) > 1:
            await messages(call, 2)
            await call.write(requests[1])
        await fails(call, grpc.StatusCode.INVALID_ARGUMENT, words)

    run(test)
