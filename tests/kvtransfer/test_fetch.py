"""A worker fetches named blocks out of another's cache, and every way in which that can end."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from baton.errors import DeadlineExceeded, TransferError, Unavailable
from baton.ids import BlockId
from baton.rpc import transfer_pb2, transfer_pb2_grpc
from kvtransfer.fetch import client, sending, servicer
from kvtransfer.fetch.client import FetchCancelled, NoLink
from tests.kvtransfer.fetch_rig import HAS, RESERVED, Rig, rig
from tests.kvtransfer.transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT, slices

NUMBERS = range(HAS)
ONE_BLOCK_A_GROUP = pytest.mark.usefixtures("one_block_a_group")


def fetching(test: Callable[[Rig], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), rig(**options) as both:
            await test(both)
            await both.until_let_go()

    asyncio.run(run())


@pytest.fixture
def one_block_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "GROUP_BYTES_MAX", SOURCE_LAYOUT.block_bytes)


# ---- what comes


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
def test_all_blocks_come_where_they_were_reserved_and_nothing_else_changes(transport: str) -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch(NUMBERS)
        assert (fetched.blocks, fetched.error, fetched.settling) == (HAS, None, None)
        assert fetched.digests == tuple(both.target.digests(RESERVED[:HAS]))
        assert both.came_in_order(HAS)
        others = [block for block in range(TARGET_LAYOUT.pool_blocks) if block not in RESERVED[:HAS]]
        assert not slices(both.target)[:, :, others].any()
        assert fetched.transfer_bytes == HAS * SOURCE_LAYOUT.block_bytes
        assert both.sent == [(fetched.transfer_bytes, fetched.transfer_s)]

    fetching(test, transport=transport)


def test_what_the_sender_has_from_the_first_name_on_comes() -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch([9, 10, 11, 12, 0])
        assert (fetched.blocks, fetched.error) == (3, None)
        assert [both.came(9 + i, i) for i in range(3)] == [True] * 3
        assert not slices(both.target)[:, :, RESERVED[3:5]].any()

    fetching(test)


def test_a_sender_that_has_none_says_so() -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch([HAS, 0, 1])
        assert (fetched.blocks, fetched.error, both.sent) == (0, None, [])

    fetching(test)


@ONE_BLOCK_A_GROUP
def test_many_fetches_at_a_time_do_not_mix() -> None:
    async def test(both: Rig) -> None:
        await both.links.to(both.address)

        async def one(index: int) -> None:
            names = [index.to_bytes(16, "little")]
            reserved = [RESERVED[index]]
            fetched = await both.fetcher.fetch(both.address, "a", names, reserved, 10.0, both.cancelled)  # type: ignore[arg-type]
            assert (fetched.blocks, fetched.error) == (1, None)

        await asyncio.gather(*map(one, NUMBERS))
        assert both.came_in_order(HAS)

    fetching(test)


@pytest.mark.parametrize("policy", ["sampled", "never"])
def test_digests_are_told_whether_they_are_looked_at_or_not(policy: str) -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch(NUMBERS)
        assert fetched.digests == tuple(both.target.digests(RESERVED[:HAS]))

    fetching(test, policy=policy)


def test_without_digests_they_are_zero() -> None:
    async def test(both: Rig) -> None:
        both.cache.makes_digests = False
        assert (await both.fetch([1, 2])).digests == (0, 0)
        assert both.came(1, 0) and both.came(2, 1)

    fetching(test, policy="never")


# ---- what comes wrong


class Wrong:
    """Sends another block in place of one, so many times."""

    def __init__(self, block: BlockId, times: int) -> None:
        self.block, self.left = block, times

    async def __call__(self, layer: int, source: Sequence[BlockId]) -> Sequence[BlockId]:
        if layer != 1 or self.block not in source or not self.left:
            return source
        self.left -= 1
        return [BlockId(14) if block == self.block else block for block in source]


@pytest.mark.parametrize("groups", ["one", "many"])
def test_a_wrong_block_is_asked_for_again(groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if groups == "many":
        monkeypatch.setattr(sending, "GROUP_BYTES_MAX", 2 * SOURCE_LAYOUT.block_bytes)

    async def test(both: Rig) -> None:
        both.book.before_write = Wrong(BlockId(HAS - 5), times=1)
        fetched = await both.fetch(NUMBERS)
        assert (fetched.blocks, fetched.error) == (HAS, None)
        assert both.came_in_order(HAS)
        assert both.metrics.get_sample_value("baton_kv_blocks_resent_total") == 1
        assert both.metrics.get_sample_value("baton_kv_blocks_verified_total", {"result": "mismatch"}) == 1

    fetching(test)


def test_after_a_block_that_stays_wrong_nothing_counts() -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = Wrong(BlockId(HAS - 5), times=2)
        fetched = await both.fetch(NUMBERS)
        assert fetched.blocks == 5 and isinstance(fetched.error, TransferError)
        assert all(both.came(i, i) for i in range(5))

    fetching(test)


# ---- ends


class Stuck:
    """Writes of one layer of one block wait until they are let on."""

    def __init__(self, block: BlockId) -> None:
        self.block = block
        self.is_there, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, layer: int, source: Sequence[BlockId]) -> Sequence[BlockId]:
        if layer == 1 and self.block in source:
            self.is_there.set()
            await self.go_on.wait()
        return source


@ONE_BLOCK_A_GROUP
def test_a_fetch_that_is_taken_back_ends_with_what_it_has() -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = stuck = Stuck(BlockId(HAS - 3))
        fetching = asyncio.create_task(both.fetch(NUMBERS))
        await stuck.is_there.wait()
        await _until_verified(both, 3)
        both.cancelled.set()
        fetched = await fetching
        assert fetched.blocks == 3 and isinstance(fetched.error, FetchCancelled)
        await both.until_let_go()
        before = bytes(both.target.memory)
        stuck.go_on.set()
        await asyncio.sleep(0)
        assert bytes(both.target.memory) == before

    fetching(test)


def test_one_that_is_taken_back_before_it_began_asks_nobody() -> None:
    async def test(both: Rig) -> None:
        both.cancelled.set()
        fetched = await both.fetch(NUMBERS)
        assert fetched.blocks == 0 and isinstance(fetched.error, FetchCancelled)
        assert not slices(both.target)[:, :, RESERVED].any()

    fetching(test)


@pytest.mark.parametrize("side", ["receiver", "sender"])
@ONE_BLOCK_A_GROUP
def test_a_fetch_ends_with_its_deadline(side: str) -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = Stuck(BlockId(HAS - 3))
        fetched = await both.fetch(NUMBERS, deadline_s=2.0 if side == "receiver" else 10)
        assert fetched.blocks == 3
        assert isinstance(fetched.error, DeadlineExceeded if side == "receiver" else Unavailable)

    fetching(test, timeout_s=20 if side == "receiver" else 2.0)


@ONE_BLOCK_A_GROUP
def test_a_write_that_stalls_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = Stuck(BlockId(HAS - 3))
        fetched = await both.fetch(NUMBERS)
        assert fetched.blocks == 3 and "moved nothing" in str(fetched.error)

    monkeypatch.setattr(sending, "STALL_TIMEOUT_S", 1.0)
    fetching(test)


@ONE_BLOCK_A_GROUP
def test_what_came_before_the_sender_died_counts() -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = stuck = Stuck(BlockId(HAS - 3))
        fetching = asyncio.create_task(both.fetch(NUMBERS))
        await stuck.is_there.wait()
        await _until_verified(both, 3)
        await both.server.stop(0)
        fetched = await fetching
        assert fetched.blocks == 3 and isinstance(fetched.error, Unavailable)
        assert all(both.came(i, i) for i in range(3))

    fetching(test)


def test_a_sender_lets_go_when_the_receiver_is_gone() -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = stuck = Stuck(BlockId(HAS - 3))
        fetching = asyncio.create_task(both.fetch(NUMBERS))
        await stuck.is_there.wait()
        assert len(both.cache.held) == HAS
        await both.channels.close()
        fetched = await fetching
        assert fetched.blocks == 0 and isinstance(fetched.error, Unavailable)

    fetching(test)


def test_closing_the_servicer_ends_what_is_under_way() -> None:
    async def test(both: Rig) -> None:
        both.book.before_write = stuck = Stuck(BlockId(HAS - 3))
        fetching = asyncio.create_task(both.fetch(NUMBERS))
        await stuck.is_there.wait()
        await both.servicer.close()
        assert not both.cache.held and not len(both.servicer)
        assert isinstance((await fetching).error, Unavailable)

    fetching(test)


def test_blocks_that_somebody_may_still_write_into_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(both: Rig) -> None:
        settled = asyncio.Event()

        async def settle(request_id: object) -> None:
            del request_id
            await settled.wait()

        await both.links.to(both.address)
        monkeypatch.setattr(both.receiving, "settle", settle)
        fetched = await both.fetch(NUMBERS)
        assert fetched.blocks == 0 and isinstance(fetched.error, TransferError)
        assert fetched.settling is not None and not fetched.settling.done()
        settled.set()
        await fetched.settling

    monkeypatch.setattr(client, "SETTLE_TIMEOUT_S", 0.05)
    fetching(test)


# ---- what is refused


def test_a_link_that_the_sender_has_forgotten_is_made_anew() -> None:
    async def test(both: Rig) -> None:
        assert (await both.fetch([0])).blocks == 1
        forgotten = dict(both.book._links)
        both.book._links.clear()
        fetched = await both.fetch([0, 1])
        both.book._links.update(forgotten)  # for its stream, which ends
        assert fetched.blocks == 0 and isinstance(fetched.error, NoLink)
        assert (await both.fetch([0, 1])).blocks == 2

    fetching(test)


def test_a_fetch_without_a_link_begins_one_and_does_not_wait() -> None:
    async def test(both: Rig) -> None:
        for _ in range(2):
            fetched = await both.fetcher.fetch(both.address, "a", [bytes(16)], RESERVED[:1], 10.0, both.cancelled)  # type: ignore[arg-type, list-item]
            assert fetched.blocks == 0 and isinstance(fetched.error, NoLink)
        assert not both.fetcher.is_linked(both.address)
        await both.links.to(both.address)
        assert both.fetcher.is_linked(both.address)
        assert both.metrics.get_sample_value("baton_kv_link_attempts_total", {"side": "receive"}) == 1
        assert (await both.fetch([0])).blocks == 1

    fetching(test)


def test_other_weights_are_refused() -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch([0])
        assert fetched.blocks == 0 and "must not mix" in str(fetched.error)

    fetching(test, fingerprint="g")


def test_another_layout_gets_no_link() -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch([0])
        assert fetched.blocks == 0 and isinstance(fetched.error, NoLink)

    fetching(test, target_layout=replace(TARGET_LAYOUT, head_dim=16))


def test_nobody_fetches_from_a_worker_that_is_not_there() -> None:
    async def test(both: Rig) -> None:
        both.address = "127.0.0.1:1"
        fetched = await both.fetch([0])
        assert fetched.blocks == 0 and isinstance(fetched.error, NoLink)

    fetching(test)


def test_more_than_it_can_send_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(both: Rig) -> None:
        fetched = await both.fetch([0])
        assert fetched.blocks == 0 and "as many blocks as it can" in str(fetched.error)

    monkeypatch.setattr(servicer, "FETCHES_MAX", 0)
    fetching(test)


async def _answer(both: Rig, *requests: transfer_pb2.FetchRequest) -> grpc.StatusCode:
    """Of a receiver of whom nobody knows what it will send."""
    channel = await both.channels.to(both.address)
    call = transfer_pb2_grpc.TransferStub(channel).Fetch()
    for request in requests:
        await call.write(request)
    with contextlib.suppress(grpc.aio.AioRpcError):
        while isinstance(await call.read(), transfer_pb2.FetchResponse):
            pass
    return await call.code()


async def _ticket(both: Rig, **changes: Any) -> transfer_pb2.FetchTicket:
    link = await both.links.to(both.address)
    fetch = client._Fetch("a", [bytes(16)], RESERVED[:1], both.fetcher._clock() + 10, both.cancelled)  # type: ignore[arg-type]
    offer = both.receiving.open(link.transport, "a", RESERVED[:1])  # type: ignore[arg-type]
    ticket = both.fetcher._ticket("a", offer, fetch)  # type: ignore[arg-type]
    for field, value in changes.items():
        ticket.ClearField(field)  # type: ignore[arg-type]
        ticket.MergeFrom(transfer_pb2.FetchTicket(**{field: value}))
    link.sign(ticket)
    return ticket


def test_tickets_that_nobody_signed_or_that_were_used_are_refused() -> None:
    async def test(both: Rig) -> None:
        ticket = await _ticket(both)
        request = transfer_pb2.FetchRequest(ticket=ticket)
        ticket.blocks[0] = RESERVED[1]
        changed = transfer_pb2.FetchRequest(ticket=ticket)
        assert await _answer(both, changed) is grpc.StatusCode.UNAUTHENTICATED
        cancel = transfer_pb2.FetchRequest(cancel=transfer_pb2.FetchCancel())
        assert await _answer(both, request, cancel) is grpc.StatusCode.OK
        assert await _answer(both, request) is grpc.StatusCode.UNAUTHENTICATED

    fetching(test)


@pytest.mark.parametrize(
    "changes", [{"blocks": [1, 2]}, {"names": []}, {"names": [b"x"] * 99, "blocks": [1] * 99}, {"fingerprint": "g"}]
)
def test_tickets_that_cannot_be_served_are_refused(changes: dict[str, Any]) -> None:
    async def test(both: Rig) -> None:
        request = transfer_pb2.FetchRequest(ticket=await _ticket(both, **changes))
        assert await _answer(both, request) in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        )

    fetching(test)


def test_a_stream_that_begins_or_goes_on_wrong_is_refused() -> None:
    async def test(both: Rig) -> None:
        resend = transfer_pb2.FetchRequest(resend=transfer_pb2.ResendBlocks(indices=[7]))
        assert await _answer(both, resend) is grpc.StatusCode.INVALID_ARGUMENT
        ticket = transfer_pb2.FetchRequest(ticket=await _ticket(both))
        assert await _answer(both, ticket, resend) is grpc.StatusCode.INVALID_ARGUMENT
        ticket = transfer_pb2.FetchRequest(ticket=await _ticket(both))
        assert await _answer(both, ticket, ticket) is grpc.StatusCode.INVALID_ARGUMENT

    fetching(test)


def test_a_stream_that_says_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(both: Rig) -> None:
        assert await _answer(both) in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

    monkeypatch.setattr(servicer, "TICKET_TIMEOUT_S", 0.1)
    fetching(test)


async def _until_verified(both: Rig, blocks: int) -> None:
    def verified() -> float | None:
        return both.metrics.get_sample_value("baton_kv_blocks_verified_total", {"result": "match"})

    async with asyncio.timeout(30):
        while verified() != blocks:  # noqa: ASYNC110 - a thread's doing, of which nobody is told
            await asyncio.sleep(0.005)


def test_a_wrong_secret_fetches_nothing() -> None:
    async def test(both: Rig) -> None:
        both.links._receiver._secret = b"another"
        fetched = await both.fetch([0])
        assert fetched.blocks == 0 and isinstance(fetched.error, NoLink)

    fetching(test)
