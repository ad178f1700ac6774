"""The shm transport: what is mapped and for how long, and where a copy stops."""

import asyncio
import fcntl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from transfer_rig import (
    REQUEST,
    SOURCE_LAYOUT,
    TARGET_LAYOUT,
    fill_random,
    ids,
    is_mapped,
    pair,
    slices,
    transfer_threads,
)

from baton.errors import TransferError
from baton.ids import RequestId
from baton.layout import KVLayout
from kvtransfer.interface import Offer
from kvtransfer.metrics import TransferMetrics
from kvtransfer.region import HostRegion
from kvtransfer.shm import fence
from kvtransfer.shm.receiver import ShmReceiver
from kvtransfer.shm.sender import INLINE_BYTES_MAX, PIECE_BYTES_MAX, ShmSender
from kvtransfer.shm.table import Invitation


class WatchedRegion(HostRegion):
    """Calls `on_read` before each copy out of it, in the copy's thread: so it is no host memory to who reads it."""

    is_host = False

    on_read: Callable[[], object] = staticmethod(lambda: None)

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        self.on_read()
        return super().readable(layer, kv, first_block, blocks)


@asynccontextmanager
async def ends(idle_s: float = 10.0) -> AsyncIterator[tuple[ShmReceiver, ShmSender]]:
    source, target = WatchedRegion.allocate(SOURCE_LAYOUT), HostRegion.allocate(TARGET_LAYOUT)
    fill_random(source, seed=1)
    receiver, sender = ShmReceiver(target), ShmSender(source, TransferMetrics(CollectorRegistry()), idle_s)
    await receiver.start()
    try:
        yield receiver, sender
    finally:
        await sender.close()
        await receiver.close()
        source.close()
        target.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def offer_of(receiver: ShmReceiver, request_id: str = REQUEST, *blocks: int) -> Offer:
    (offer,) = receiver.open(RequestId(request_id), ids(*blocks or (1,)))
    return offer


async def turns(count: int) -> None:
    """Gives the loop so many turns, in the first of which timers that are due go off."""
    for _ in range(count):
        await asyncio.sleep(0)


def target_of(receiver: ShmReceiver) -> HostRegion:
    assert isinstance(receiver._region, HostRegion)
    return receiver._region


def test_a_peer_is_mapped_once_for_all_its_tickets() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            first = await sender.connect(offer_of(receiver, "req-1"), TARGET_LAYOUT)
            second = await sender.connect(offer_of(receiver, "req-2"), TARGET_LAYOUT)
            assert len(sender.peers) == 1
            await first.close()
            await second.close()
            third = await sender.connect(offer_of(receiver, "req-3"), TARGET_LAYOUT)
            assert third._peer is first._peer

    run(scenario())
    assert not is_mapped()


def test_an_idle_peer_is_unmapped() -> None:
    async def scenario() -> None:
        async with ends(idle_s=0) as (receiver, sender):
            connection = await sender.connect(offer_of(receiver), TARGET_LAYOUT)
            await turns(1000)
            assert len(sender.peers) == 1
            await connection.close()
            await turns(1000)
            assert len(sender.peers) == 0

    run(scenario())


def test_a_refused_offer_keeps_nothing_mapped() -> None:
    async def scenario() -> None:
        async with ends(idle_s=0) as (receiver, sender):
            offer = offer_of(receiver)
            receiver.close_ticket(REQUEST)
            with pytest.raises(TransferError, match="closed the ticket"):
                await sender.connect(offer, TARGET_LAYOUT)
            await turns(1000)
            assert len(sender.peers) == 0

    run(scenario())


def test_a_slot_used_again_does_not_revive_the_ticket_before() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            receiver._free_slots = [7]
            earlier = await sender.connect(offer_of(receiver, "req-1"), TARGET_LAYOUT)
            receiver.close_ticket(RequestId("req-1"))
            later = await sender.connect(offer_of(receiver, "req-2"), TARGET_LAYOUT)
            await later.fence()
            with pytest.raises(TransferError, match="closed the ticket"):
                await earlier.fence()

    run(scenario())


def test_with_no_slot_left_there_is_no_offer() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, _):
            receiver._free_slots = [7]
            offer_of(receiver, "req-1")
            assert receiver.open(RequestId("req-2"), ids(2)) == ()
            receiver.close_ticket(RequestId("req-2"))
            receiver.close_ticket(RequestId("req-1"))
            offer_of(receiver, "req-3")

    run(scenario())


def test_closing_the_ticket_stops_a_write_before_its_next_copy() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            connection = await sender.connect(offer_of(receiver, REQUEST, 1, 3, 5, 7), TARGET_LAYOUT)
            copies = 0

            def close_at_the_third() -> None:
                nonlocal copies
                copies += 1
                if copies == 3:
                    receiver.close_ticket(REQUEST)

            connection._source.on_read = close_at_the_third  # type: ignore[attr-defined]
            with pytest.raises(TransferError, match="closed the ticket"):
                await connection.write(0, ids(1, 3, 5, 7), ids(1, 3, 5, 7))
            target = slices(target_of(receiver))
            assert target[0, :, [1, 3]].any(axis=2).all()
            assert not target[0, :, [5, 7]].any()

    run(scenario())


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_write_ends_when_its_copy_under_way_has_ended(how: str) -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            connection = await sender.connect(offer_of(receiver, REQUEST, 1, 3), TARGET_LAYOUT)
            reading, go_on = asyncio.Event(), threading.Event()
            loop = asyncio.get_running_loop()

            def block() -> None:
                loop.call_soon_threadsafe(reading.set)
                assert go_on.wait(30)

            connection._source.on_read = block  # type: ignore[attr-defined]
            writing = asyncio.ensure_future(connection.write(0, ids(1, 3), ids(1, 3)))
            await reading.wait()
            closing = asyncio.ensure_future(connection.close()) if how == "closed" else None
            for _ in range(3):
                if how == "cancelled":
                    writing.cancel()
                await turns(1)
            assert not writing.done()
            assert closing is None or not closing.done()
            go_on.set()
            with pytest.raises(asyncio.CancelledError if how == "cancelled" else TransferError):
                await writing
            assert not slices(target_of(receiver))[0, :, 3].any()
            await (closing or connection.close())

    run(scenario())


@pytest.mark.parametrize(("writes", "blocks"), [(1, 16), (16, 1)], ids=["one large", "many small"])
def test_what_is_copied_on_the_loop_lets_others_have_their_turns(writes: int, blocks: int) -> None:
    layout = KVLayout(layers=1, blocks=16, block_tokens=16, kv_heads=8, head_dim=128, dtype="float32")

    async def scenario() -> None:
        async with pair("shm", layout, layout) as ends:
            connection = await ends.connect(ids(*range(16)))
            turns = 0

            async def write_all() -> None:
                for first in range(0, 16, blocks):
                    await connection.write(0, ids(*range(first, first + blocks)), ids(*range(first, first + blocks)))

            writing = asyncio.ensure_future(write_all())
            while not writing.done():
                await asyncio.sleep(0)
                turns += 1
            assert 2 * 16 * layout.slice_bytes == INLINE_BYTES_MAX == writes * blocks * 2 * layout.slice_bytes
            assert turns >= INLINE_BYTES_MAX // PIECE_BYTES_MAX
            assert (slices(ends.source) == slices(ends.target)).all()
            assert not transfer_threads()

    run(scenario())


# ---- fencing


class Halted:
    """A write of blocks 1 and 3 in layer 0, in the middle of its first copy until `go_on` is set."""

    def __init__(self, receiver: ShmReceiver, sender: ShmSender) -> None:
        self.receiver, self.sender = receiver, sender
        self.go_on = threading.Event()

    async def begin(self) -> None:
        self.connection = await self.sender.connect(offer_of(self.receiver, REQUEST, 1, 3), TARGET_LAYOUT)
        reading, loop = asyncio.Event(), asyncio.get_running_loop()

        def block() -> None:
            loop.call_soon_threadsafe(reading.set)
            assert self.go_on.wait(30)

        self.connection._source.on_read = block  # type: ignore[attr-defined]
        self.writing = asyncio.ensure_future(self.connection.write(0, ids(1, 3), ids(1, 3)))
        await reading.wait()

    async def end(self) -> None:
        self.go_on.set()
        with pytest.raises(TransferError, match="closed the ticket"):
            await self.writing


async def is_settled(receiver: ShmReceiver, request_id: RequestId = REQUEST) -> bool:
    """Now, and not when a copy has ended meanwhile."""
    settling = asyncio.ensure_future(receiver.settle(request_id))
    await turns(3)
    is_done = settling.done()
    settling.cancel()
    await asyncio.wait((settling,))
    return is_done


def test_where_nothing_is_under_way_a_ticket_is_settled_at_once() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            connection = await sender.connect(offer_of(receiver, REQUEST, 1, 3), TARGET_LAYOUT)
            await connection.write(0, ids(1), ids(1))
            receiver.close_ticket(REQUEST)
            assert await is_settled(receiver)
            assert await is_settled(receiver, RequestId("never heard of"))
            assert not receiver._unsettled

    run(scenario())


def test_a_copy_under_way_keeps_its_ticket_unsettled_and_nobody_elses() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            halted = Halted(receiver, sender)
            await halted.begin()
            offer_of(receiver, "req-2", 5)
            receiver.close_ticket(REQUEST)
            receiver.close_ticket(RequestId("req-2"))
            assert not await is_settled(receiver)
            assert not await is_settled(receiver)
            assert await is_settled(receiver, RequestId("req-2"))
            await halted.end()
            await receiver.settle(REQUEST)
            assert not slices(target_of(receiver))[0, :, 3].any()
            assert not receiver._unsettled

    run(scenario())


def test_all_tickets_that_a_request_had_must_settle() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            halted = Halted(receiver, sender)
            await halted.begin()
            offer_of(receiver, REQUEST, 5)  # of the next attempt
            receiver.close_ticket(REQUEST)
            assert not await is_settled(receiver)
            await halted.end()
            await receiver.settle(REQUEST)

    run(scenario())


def test_a_late_writer_in_a_slot_used_again_hinders_nobody() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            receiver._free_slots = [7]
            halted = Halted(receiver, sender)
            await halted.begin()
            receiver.close_ticket(REQUEST)
            offer = offer_of(receiver, "req-2", 5)
            connection = await sender.connect(offer, TARGET_LAYOUT)
            await connection.fence()
            receiver.close_ticket(RequestId("req-2"))
            assert await is_settled(receiver, RequestId("req-2"))
            assert not await is_settled(receiver)
            await halted.end()

    run(scenario())


def test_a_receiver_that_closes_waits_for_nobody() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            halted = Halted(receiver, sender)
            await halted.begin()
            receiver.close_ticket(REQUEST)
            settling = asyncio.ensure_future(receiver.settle(REQUEST))
            await turns(1)
            await receiver.close()
            await settling
            halted.go_on.set()
            with pytest.raises(TransferError):
                await halted.writing

    run(scenario())


def test_a_ticket_is_one_connections() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            offer = offer_of(receiver)
            first = await sender.connect(offer, TARGET_LAYOUT)
            with pytest.raises(TransferError, match="Another connection has this ticket"):
                await sender.connect(offer, TARGET_LAYOUT)
            await first.close()
            await sender.connect(offer, TARGET_LAYOUT)

    run(scenario())


def test_a_ticket_being_settled_is_not_entered() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            connection = await sender.connect(offer_of(receiver), TARGET_LAYOUT)
            assert receiver._table is not None
            fence._lock(receiver._table.share().fd, fcntl.F_WRLCK, connection._invitation.ticket)
            with pytest.raises(TransferError, match="closed the ticket"):
                await connection.write(0, ids(1), ids(1))
            assert not slices(target_of(receiver)).any()

    run(scenario())


def test_blocks_that_the_region_does_not_have_are_refused() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            with pytest.raises(TransferError, match="does not have"):
                await sender.connect(offer_of(receiver, REQUEST, TARGET_LAYOUT.blocks), TARGET_LAYOUT)

    run(scenario())


@given(st.binary(max_size=400))
def test_garbage_is_no_offer(data: bytes) -> None:
    with pytest.raises(TransferError):
        Invitation.unpack(data)


def test_an_offer_cut_or_stretched_anywhere_is_refused() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, sender):
            offer = offer_of(receiver, REQUEST, 1, 2, 3)
            for length in range(len(offer.descriptor)):
                with pytest.raises(TransferError):
                    await sender.connect(Offer("shm", offer.descriptor[:length]), TARGET_LAYOUT)
            with pytest.raises(TransferError):
                await sender.connect(Offer("shm", offer.descriptor + b"x"), TARGET_LAYOUT)
            assert len(sender.peers) == 0

    run(scenario())


def test_secrets_stay_out_of_logs() -> None:
    async def scenario() -> None:
        async with ends() as (receiver, _):
            offer = offer_of(receiver)
            invitation = Invitation.unpack(offer.descriptor)
            shown = f"{offer!r} {invitation!r}"
            assert repr(invitation.secret)[2:-1] not in shown
            assert repr(invitation.table.nonce)[2:-1] not in shown

    run(scenario())
