"""Every attempt at a prefill worker ends in one explicit outcome. The prefill worker here is scripted: a real
gRPC server that answers as each test says, because the real one would not misbehave on demand."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from baton.errors import TransferError, Unavailable
from baton.ids import BlockId
from baton.rpc import transfer_pb2, worker_pb2, worker_pb2_grpc
from baton.rpc.channels import Channels
from decode_worker import prefill_client
from decode_worker.prefill_client import PrefillCancelled, PrefillClient
from kvtransfer.link.proof import UNKNOWN_LINK, UnknownLink
from kvtransfer.verify import Verifier, VerifyMetrics

Script = Callable[["grpc.aio.ServicerContext"], Awaitable[None]]  # type: ignore[type-arg]


def started(**fields: Any) -> worker_pb2.PrefillResponse:
    return worker_pb2.PrefillResponse(started=worker_pb2.PrefillStarted(transport="tcp", **fields))


def landed(first: int, *digests: int) -> worker_pb2.PrefillResponse:
    return worker_pb2.PrefillResponse(landed=transfer_pb2.BlocksLanded(first=first, digests=digests))


def commit(blocks: int) -> worker_pb2.PrefillResponse:
    return worker_pb2.PrefillResponse(commit=worker_pb2.PrefillCommit(first_token=7, blocks=blocks))


RELEASED = worker_pb2.PrefillResponse(released=worker_pb2.PrefillReleased())
TICKET = worker_pb2.Ticket(request_id="r", prompt=[1, 2, 3], blocks=[5, 6])


class Region:
    """Block b has the digest 10 * b, but for those whose bytes are wrong."""

    def __init__(self) -> None:
        self.wrong: set[int] = set()

    def digests(self, blocks: Sequence[BlockId]) -> list[int]:
        return [10 * block + (block in self.wrong) for block in blocks]


class Scripted(worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def Prefill(self, request_iterator: object, context: Any) -> None:  # noqa: ARG002, N802
        ticket = await context.read()
        assert ticket.ticket == TICKET
        await self._script(context)


Body = Callable[[PrefillClient, str], Awaitable[None]]


async def with_scripted(script: Script, test: Body, timeout_s: float = 30, region: Region | None = None) -> None:
    server = grpc.aio.server()
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(Scripted(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channels = Channels()
    metrics = VerifyMetrics(CollectorRegistry())
    verifier = Verifier(region or Region(), "always", metrics, Random(0))  # type: ignore[arg-type]
    client = PrefillClient(channels.to, verifier, timeout_s)
    try:
        await test(client, f"127.0.0.1:{port}")
    finally:
        await client.close()
        await channels.close()
        await server.stop(0)


def fails(script: Script, match: str, timeout_s: float = 30, region: Region | None = None) -> None:
    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises((Unavailable, TransferError), match=match):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test, timeout_s, region))


def test_returns_what_the_prefill_worker_committed_and_lets_it_go() -> None:
    ended = []

    async def script(context: Any) -> None:
        await context.write(started(queue_s=0.5))
        await context.write(landed(0, 50))
        await context.write(landed(1, 60))
        await context.write(commit(2))
        ended.append(await context.read())

    async def test(client: PrefillClient, address: str) -> None:
        filled = await client.prefill(address, TICKET, asyncio.Event())
        assert (filled.started.queue_s, filled.commit.first_token, filled.digests) == (0.5, 7, (50, 60))

    asyncio.run(with_scripted(script, test))
    assert ended == [grpc.aio.EOF]


def test_a_prefill_worker_without_digests_gives_none() -> None:
    async def script(context: Any) -> None:
        for message in (started(), landed(0, 0, 0), commit(2)):
            await context.write(message)
        await context.read()

    class NoDigests(Region):
        def digests(self, blocks: Sequence[BlockId]) -> list[int]:
            return [0 for _ in blocks]

    async def test(client: PrefillClient, address: str) -> None:
        assert (await client.prefill(address, TICKET, asyncio.Event())).digests == ()

    asyncio.run(with_scripted(script, test, region=NoDigests()))


@pytest.mark.parametrize("committed_first", [False, True])
def test_a_block_that_does_not_match_is_asked_for_again(committed_first: bool) -> None:
    region = Region()
    region.wrong.add(6)

    async def script(context: Any) -> None:
        await context.write(started())
        await context.write(landed(0, 50, 60))
        if committed_first:
            await context.write(commit(2))
        assert list((await context.read()).resend.indices) == [1]
        region.wrong.clear()
        await context.write(landed(1, 60))
        if not committed_first:
            await context.write(commit(2))
        assert await context.read() is grpc.aio.EOF

    async def test(client: PrefillClient, address: str) -> None:
        assert (await client.prefill(address, TICKET, asyncio.Event())).digests == (50, 60)

    asyncio.run(with_scripted(script, test, region=region))


def test_a_block_that_does_not_match_again_is_a_failure() -> None:
    region = Region()
    region.wrong.add(6)

    async def script(context: Any) -> None:
        for message in (started(), landed(0, 50, 60), commit(2)):
            await context.write(message)
        assert list((await context.read()).resend.indices) == [1]
        await context.write(landed(1, 60))
        await context.read()

    fails(script, "did not match", region=region)


def test_a_block_told_without_being_asked_for_is_a_failure() -> None:
    async def script(context: Any) -> None:
        for message in (started(), landed(0, 50), landed(0, 50)):
            await context.write(message)
        await context.read()

    fails(script, "nobody waits for")


def test_a_refusal_says_why() -> None:
    async def script(context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "The queue is full.")

    fails(script, "RESOURCE_EXHAUSTED: The queue is full")


def test_an_unknown_link_is_told_apart() -> None:
    async def script(context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, UNKNOWN_LINK)

    async def test(client: PrefillClient, address: str) -> None:
        with pytest.raises(UnknownLink):
            await client.prefill(address, TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test))


def test_nobody_at_the_address() -> None:
    async def script(context: Any) -> None: ...

    async def test(client: PrefillClient, _: str) -> None:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 failed: UNAVAILABLE"):
            await client.prefill("127.0.0.1:1", TICKET, asyncio.Event())

    asyncio.run(with_scripted(script, test))


def test_a_stream_that_ends_without_a_commit_is_a_failure() -> None:
    async def script(context: Any) -> None:
        await context.write(started())
        await context.write(landed(0, 50, 60))

    fails(script, "ended the stream")


def test_a_stream_that_ends_after_the_commit_while_a_block_is_asked_for_again_is_a_failure() -> None:
    region = Region()
    region.wrong.add(6)

    async def script(context: Any) -> None:
        for message in (started(), landed(0, 50, 60), commit(2)):
            await context.write(message)
        await context.read()

    fails(script, "ended the stream", region=region)


@pytest.mark.parametrize(
    "messages", [(started(), landed(0, 50, 60), commit(1)), (started(), landed(0, 50), commit(2)), (commit(2),)]
)
def test_a_commit_of_what_was_not_sent_is_a_failure(messages: Sequence[worker_pb2.PrefillResponse]) -> None:
    async def script(context: Any) -> None:
        for message in messages:
            await context.write(message)
        await context.read()

    fails(script, "blocks where 2 were asked for")


def test_cancelling_waits_for_the_release() -> None:
    events: list[str] = []

    async def test() -> None:
        running, cancelled = asyncio.Event(), asyncio.Event()

        async def script(context: Any) -> None:
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
    async def script(context: Any) -> None:
        await context.write(started())
        assert (await context.read()).WhichOneof("message") == "cancel"
        await context.write(RELEASED)

    fails(script, r"did not finish within 0\.2 s", timeout_s=0.2)


def test_one_that_does_not_even_answer_the_cancel_is_left_after_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_client, "RELEASE_TIMEOUT_S", 0.2)

    async def script(context: Any) -> None:
        await context.write(started())
        await context.read()
        await asyncio.Event().wait()

    fails(script, "did not finish", timeout_s=0.2)


@pytest.mark.parametrize("end", ["cancelled", "timeout"])
def test_a_connection_that_never_comes_about_holds_nobody_up(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_client, "RELEASE_TIMEOUT_S", 0.1)

    async def main() -> None:
        channels, cancelled = Channels(), asyncio.Event()
        verifier = Verifier(Region(), "always", VerifyMetrics(CollectorRegistry()), Random(0))  # type: ignore[arg-type]
        client = PrefillClient(channels.to, verifier, timeout_s=0.2 if end == "timeout" else 30)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing on them
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            asking = asyncio.ensure_future(client.prefill(address, TICKET, cancelled))
            await asyncio.wait({asking}, timeout=0.1)
            if end == "cancelled":
                cancelled.set()
            with pytest.raises(PrefillCancelled if end == "cancelled" else Unavailable):
                async with asyncio.timeout(30):
                    await asking
        await client.close()
        await channels.close()

    asyncio.run(main())


def test_one_that_does_not_end_the_stream_after_the_commit_is_left_after_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill_client, "RELEASE_TIMEOUT_S", 0.2)
    hung_up = asyncio.Event()

    async def script(context: Any) -> None:
        for message in (started(), landed(0, 50, 60), commit(2)):
            await context.write(message)
        try:
            await asyncio.Event().wait()
        finally:
            hung_up.set()

    async def test(client: PrefillClient, address: str) -> None:
        await client.prefill(address, TICKET, asyncio.Event())
        await client.close()
        await hung_up.wait()

    asyncio.run(with_scripted(script, test))
