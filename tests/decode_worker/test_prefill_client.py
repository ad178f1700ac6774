"""Every attempt at a prefill worker ends in one explicit outcome. The prefill worker here is scripted: a real
gRPC server that answers as each test says, because the real one would not misbehave on demand."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable

import grpc.aio
import pytest

from baton.errors import Unavailable
from baton.process import ProcessIdentity
from baton.rpc import worker_pb2, worker_pb2_grpc
from decode_worker import prefill_client
from decode_worker.prefill_client import PrefillCancelled, PrefillClient

Script = Callable[["grpc.aio.ServicerContext"], Awaitable[None]]  # type: ignore[type-arg]


def started(**fields: object) -> worker_pb2.PrefillResponse:
    return worker_pb2.PrefillResponse(started=worker_pb2.PrefillStarted(transport="tcp", **fields))


COMMIT = worker_pb2.PrefillResponse(commit=worker_pb2.PrefillCommit(first_token=7))
RELEASED = worker_pb2.PrefillResponse(released=worker_pb2.PrefillReleased())
TICKET = worker_pb2.Ticket(request_id="r", prompt=[1, 2, 3])


async def with_scripted(script: Script, test: Callable[[PrefillClient, str], Awaitable[None]], timeout_s: float = 30):
    class Scripted(worker_pb2_grpc.PrefillWorkerServicer):
        async def Prefill(self, request_iterator, context):  # noqa: ARG002, N802
            ticket = await context.read()
            assert ticket.ticket == TICKET
            await script(context)

    server = grpc.aio.server()
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(Scripted(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = PrefillClient(timeout_s)
    try:
        await test(client, f"127.0.0.1:{port}")
    finally:
        await client.close()
        await server.stop(0)


def test_returns_what_the_prefill_worker_committed() -> None:
    async def script(context) -> None:
        await context.write(started(queue_s=0.5))
        await context.write(COMMIT)

    async def test(client: PrefillClient, address: str) -> None:
        begun, commit = await client.prefill(address, TICKET, asyncio.Event())
        assert (begun.queue_s, commit.first_token) == (0.5, 7)

    asyncio.run(with_scripted(script, test))


def test_a_refusal_says_why() -> None:
    async def script(context) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "The queue is full.")

    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises(Unavailable, match="RESOURCE_EXHAUSTED: The queue is full"):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test))


def test_nobody_at_the_address() -> None:
    async def test() -> None:
        client = PrefillClient(30)
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 failed: UNAVAILABLE"):
            await client.prefill("127.0.0.1:1", TICKET, asyncio.Event())
        await client.close()

    asyncio.run(test())


def test_a_stream_that_ends_without_a_commit_is_a_failure() -> None:
    async def script(context) -> None:
        await context.write(started())

    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises(Unavailable):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test))


def test_a_commit_of_too_few_blocks_is_a_failure() -> None:
    async def script(context) -> None:
        await context.write(started())
        await context.write(worker_pb2.PrefillResponse(commit=worker_pb2.PrefillCommit(first_token=7, blocks=2)))

    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises(Unavailable, match="2 blocks where 0 were asked for"):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test))


def test_cancelling_waits_for_the_release() -> None:
    events: list[str] = []

    async def test() -> None:
        running, cancelled = asyncio.Event(), asyncio.Event()

        async def script(context) -> None:
            await context.write(started())
            running.set()
            assert (await context.read()).WhichOneof("message") == "cancel"
            events.append("last write ended")
            await context.write(RELEASED)

        async def body(client: PrefillClient, address: str) -> None:
            attempt = asyncio.ensure_future(client.prefill(address, TICKET, cancelled))
            await running.wait()
            cancelled.set()
            with pytest.raises(PrefillCancelled):
                await attempt
            events.append("blocks are ours again")

        await with_scripted(script, body)

    asyncio.run(test())
    assert events == ["last write ended", "blocks are ours again"]


def test_a_silent_prefill_worker_is_given_up_after_the_timeout() -> None:
    async def script(context) -> None:
        await context.write(started())
        assert (await context.read()).WhichOneof("message") == "cancel"
        await context.write(RELEASED)

    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises(Unavailable, match=r"did not finish within 0\.2 s"):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test, timeout_s=0.2))


def test_one_that_does_not_even_answer_the_cancel_is_left_after_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_client, "RELEASE_TIMEOUT_S", 0.2)

    async def script(context) -> None:
        await context.write(started())
        await context.read()
        await asyncio.Event().wait()

    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises(Unavailable, match="did not finish"):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test, timeout_s=0.2))


def test_after_a_broken_stream_a_one_sided_writer_must_be_dead_before_its_blocks_are_reused() -> None:
    with subprocess.Popen(["sleep", "60"]) as writer:
        identity = ProcessIdentity.of(writer.pid)
        assert identity is not None

        async def script(context) -> None:
            await context.write(
                worker_pb2.PrefillResponse(
                    started=worker_pb2.PrefillStarted(
                        transport="shm", writer_pid=identity.pid, writer_started_ticks=identity.started_ticks
                    )
                )
            )
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

        async def test(client: PrefillClient, address: str) -> None:
            attempt = asyncio.ensure_future(client.prefill(address, TICKET, asyncio.Event()))
            done, _ = await asyncio.wait({attempt}, timeout=0.5)
            assert not done, "the writer is alive and may be in a copy"
            writer.kill()
            writer.wait()
            with pytest.raises(Unavailable, match="gone"):
                await attempt

        asyncio.run(with_scripted(script, test))
