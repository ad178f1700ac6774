"""What every transport does alike: the same tests for all of them."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import uvloop
from transfer_rig import (
    REQUEST,
    SOURCE_LAYOUT,
    TARGET_LAYOUT,
    Pair,
    StagedRegion,
    ids,
    is_mapped,
    open_fds,
    pair,
    slices,
    tampered,
    transfer_threads,
)

from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from kvtransfer.nixl.package import installed
from kvtransfer.region import HostRegion

BIG_SOURCE = KVLayout(layers=1, blocks=64, block_tokens=64, kv_heads=8, head_dim=128, dtype="float32")
"""16 MiB of keys and as much of values: more than a copy's bound and than sockets buffer."""
REGION_KINDS = {
    "inproc": [(HostRegion, HostRegion), (StagedRegion, StagedRegion)],
    "shm": [(HostRegion, HostRegion), (StagedRegion, HostRegion)],
    "tcp": [(HostRegion, HostRegion), (StagedRegion, StagedRegion)],
    "ucx": [(HostRegion, HostRegion), (StagedRegion, StagedRegion)],
    "nixl": [(HostRegion, HostRegion), (HostRegion, HostRegion)],
}


@pytest.fixture(params=["inproc", "shm", "tcp", "tcp on uvloop", "ucx", "ucx on uvloop", "nixl", "nixl on uvloop"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Workers run on uvloop, which reads and writes sockets in ways of its own."""
    name, _, loop = request.param.partition(" on ")
    if name == "ucx" and find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    if name == "nixl" and installed() is None:
        pytest.skip("no package of NIXL is installed")
    if loop:
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield name
    asyncio.set_event_loop_policy(None)


def run(transport: str, scenario: Callable[[Pair], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def body() -> None:
        async with asyncio.timeout(60), pair(transport, **options) as ends:
            await scenario(ends)

    asyncio.run(body())


@pytest.mark.parametrize("kinds", [0, 1], ids=["host", "staged"])
@pytest.mark.parametrize("seed", range(4))
def test_scattered_blocks_arrive_byte_for_byte_and_nothing_else_changes(transport: str, seed: int, kinds: int) -> None:
    source_kind, target_kind = REGION_KINDS[transport][kinds]
    rng = random.Random(seed)

    async def scenario(ends: Pair) -> None:
        blocks = rng.sample(range(TARGET_LAYOUT.blocks), 15)
        expected = slices(ends.target).copy()
        connection = await ends.connect(ids(*blocks))
        total = 0
        for layer in random.Random(seed).sample(range(3), 3):
            for _ in range(3):
                count = rng.randint(1, 15)
                source, target = rng.sample(range(SOURCE_LAYOUT.blocks), count), rng.sample(blocks, count)
                if rng.random() < 0.5:
                    source, target = sorted(source), sorted(target)
                await connection.write(layer, ids(*source), ids(*target))
                expected[layer, :, target] = slices(ends.source)[layer, :, source]
                total += 2 * count * SOURCE_LAYOUT.slice_bytes
        await connection.fence()
        assert (slices(ends.target) == expected).all()
        assert connection.bytes_written == total
        assert connection.busy_s > 0
        assert connection.transport == transport
        await connection.close()

    run(transport, scenario, source_kind=source_kind, target_kind=target_kind)


def test_a_write_larger_than_any_buffer(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        connection = await ends.connect(everything)
        await connection.write(0, everything, everything)
        await connection.fence()
        assert (slices(ends.source) == slices(ends.target)).all()

    run(transport, scenario, source_layout=BIG_SOURCE, target_layout=BIG_SOURCE)


@pytest.mark.parametrize("kinds", [0, 1], ids=["host", "staged"])
def test_many_tickets_at_once_and_one_after_the_other(transport: str, kinds: int) -> None:
    source_kind, target_kind = REGION_KINDS[transport][kinds]

    async def one(ends: Pair, block: int) -> None:
        connection = await ends.connect(ids(block), RequestId(f"req-{block}"))
        for layer in range(3):
            await connection.write(layer, ids(block % SOURCE_LAYOUT.blocks), ids(block))
            await connection.fence()
        await connection.close()
        ends.receiver.close_ticket(RequestId(f"req-{block}"))

    async def scenario(ends: Pair) -> None:
        for first in (0, 16):
            await asyncio.gather(*(one(ends, block) for block in range(first, first + 16)))
        source = [block % SOURCE_LAYOUT.blocks for block in range(TARGET_LAYOUT.blocks)]
        assert (slices(ends.target) == slices(ends.source)[:, :, source]).all()

    run(transport, scenario, source_kind=source_kind, target_kind=target_kind)


def test_a_write_of_nothing_is_nothing(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        connection = await ends.connect(ids(1))
        await connection.write(0, (), ())
        await connection.fence()
        assert connection.bytes_written == 0

    run(transport, scenario)


def test_after_its_ticket_is_closed_nothing_lands(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        connection = await ends.connect(ids(1, 2))
        await connection.write(0, ids(1), ids(1))
        await connection.fence()
        before = slices(ends.target).copy()
        ends.receiver.close_ticket(REQUEST)
        with pytest.raises(TransferError, match="closed the ticket"):
            await write_and_fence(connection)
        with pytest.raises(TransferError, match="closed the ticket"):
            await connection.fence()
        assert (slices(ends.target) == before).all()

    async def write_and_fence(connection: Any) -> None:
        await connection.write(0, ids(2), ids(2))
        await connection.fence()

    run(transport, scenario)


def test_a_closed_ticket_cannot_be_connected_to(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        offers = [ends.open(ids(1))]
        ends.receiver.close_ticket(REQUEST)
        ends.receiver.close_ticket(RequestId("never heard of"))
        with pytest.raises(TransferError, match=transport):
            await ends.sender.connect(REQUEST, offers, TARGET_LAYOUT)

    run(transport, scenario)


def test_opening_anew_withdraws_the_earlier_ticket(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        earlier = await ends.connect(ids(1))
        later = await ends.connect(ids(2))
        with pytest.raises(TransferError, match="closed the ticket"):
            await earlier.fence()
        await later.write(0, ids(1), ids(2))
        await later.fence()
        assert not slices(ends.target)[:, :, 1].any()

    run(transport, scenario)


def test_blocks_outside_the_ticket_are_refused(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        connection = await ends.connect(ids(4, 6))
        with pytest.raises(TransferError, match="not part of the ticket"):
            await write_and_fence(connection)
        assert not slices(ends.target).any()
        another = await ends.connect(ids(4, 6), RequestId("req-2"))
        await another.write(0, ids(1), ids(4))
        await another.fence()

    async def write_and_fence(connection: Any) -> None:
        await connection.write(0, ids(1, 2), ids(4, 5))
        await connection.fence()

    run(transport, scenario)


def test_a_secret_that_is_wrong_by_one_bit_opens_nothing(transport: str) -> None:
    secret_at = {"inproc": 3, "shm": 70, "tcp": 12, "ucx": 12, "nixl": 12}[transport]

    async def scenario(ends: Pair) -> None:
        offer = ends.open(ids(1))
        with pytest.raises(TransferError):
            await ends.sender.connect(REQUEST, [tampered(offer, secret_at)], TARGET_LAYOUT)
        connection = await ends.sender.connect(REQUEST, [offer], TARGET_LAYOUT)
        await connection.fence()

    run(transport, scenario)


@pytest.mark.parametrize("length", [0, 1, 10, 60, 120])
def test_a_descriptor_cut_short_is_refused(transport: str, length: int) -> None:
    async def scenario(ends: Pair) -> None:
        offer = ends.open(ids(1))
        cut = type(offer)(offer.transport, offer.descriptor[: min(length, len(offer.descriptor) - 1)])
        with pytest.raises(TransferError):
            await ends.sender.connect(REQUEST, [cut], TARGET_LAYOUT)

    run(transport, scenario)


def test_a_region_of_another_size_than_said_is_refused(transport: str) -> None:
    said = KVLayout(layers=3, blocks=TARGET_LAYOUT.blocks + 1, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")

    async def scenario(ends: Pair) -> None:
        offers = [ends.open(ids(1))]
        with pytest.raises(TransferError, match="layout"):
            await ends.sender.connect(REQUEST, offers, said)

    run(transport, scenario)


def test_a_layout_whose_slices_differ_is_refused(transport: str) -> None:
    other = KVLayout(layers=3, blocks=32, block_tokens=4, kv_heads=2, head_dim=8, dtype="bfloat16")

    async def scenario(ends: Pair) -> None:
        with pytest.raises(TransferError, match="layouts of sender and receiver differ"):
            await ends.connect(ids(1))

    run(transport, scenario, target_layout=other)


def test_a_cancelled_write_leaves_only_close(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        connection = await ends.connect(everything)
        writing = asyncio.ensure_future(connection.write(0, everything, everything))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        with pytest.raises(TransferError, match="interrupted"):
            await connection.write(0, everything, everything)
        await connection.close()
        ends.receiver.close_ticket(REQUEST)
        after = slices(ends.target).copy()
        await check_that_another_works(ends)
        changed = [block for block in everything if block != 7]
        assert (slices(ends.target)[:, :, changed] == after[:, :, changed]).all()

    async def check_that_another_works(ends: Pair) -> None:
        connection = await ends.connect(ids(7), RequestId("req-2"))
        await connection.write(0, ids(3), ids(7))
        await connection.fence()
        assert (slices(ends.target)[:, :, 7] == slices(ends.source)[:, :, 3]).all()

    run(transport, scenario, source_layout=BIG_SOURCE, target_layout=BIG_SOURCE)


def test_closing_ends_a_write_under_way(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        connection = await ends.connect(everything)
        writing = asyncio.ensure_future(connection.write(0, everything, everything))
        await asyncio.sleep(0)
        await asyncio.gather(connection.close(), connection.close())
        ends.receiver.close_ticket(REQUEST)
        after = slices(ends.target).copy()
        (outcome,) = await asyncio.gather(writing, return_exceptions=True)
        assert outcome is None or isinstance(outcome, TransferError)
        with pytest.raises(TransferError):
            await connection.fence()
        assert (slices(ends.target) == after).all()

    run(transport, scenario, source_layout=BIG_SOURCE, target_layout=BIG_SOURCE)


def test_the_loop_runs_on_during_a_large_write(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        everything = ids(*range(BIG_SOURCE.blocks))
        connection = await ends.connect(everything)

        async def write() -> None:
            await connection.write(0, everything, everything)
            await connection.fence()

        writing = asyncio.ensure_future(write())
        turns = 0
        while not writing.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 4

    run(transport, scenario, source_layout=BIG_SOURCE, target_layout=BIG_SOURCE)


def test_a_receiver_that_closed_takes_nothing(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        connection = await ends.connect(ids(1))
        await ends.receiver.close()
        with pytest.raises(TransferError):
            await connection.fence()

    run(transport, scenario)


def test_both_ends_count_what_moved(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        connection = await ends.connect(ids(1, 2))
        await connection.write(0, ids(1, 2), ids(1, 2))
        await connection.fence()
        await connection.close()
        sides = [(ends.sent, "out")] + [(ends.received, "in")] * (transport in ("tcp", "ucx"))
        for registry, direction in sides:
            labels = {"transport": transport, "direction": direction}

            def value(name: str, registry: Any = registry, labels: Any = labels) -> Any:
                return registry.get_sample_value(f"baton_kv_transfer_{name}_total", labels)

            assert value("bytes") == 4 * TARGET_LAYOUT.slice_bytes
            assert (value("writes"), value("connections")) == (1, 1)
            assert value("seconds") > 0
            assert value("failures") is None

    run(transport, scenario)


def test_failures_are_counted(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        connection = await ends.connect(ids(1))
        ends.receiver.close_ticket(REQUEST)
        with pytest.raises(TransferError):
            await connection.fence()
        labels = {"transport": transport, "direction": "out"}
        assert ends.sent.get_sample_value("baton_kv_transfer_failures_total", labels) == 1

    run(transport, scenario)


def test_nothing_is_left_open(transport: str) -> None:
    async def scenario(ends: Pair) -> None:
        used = [await ends.connect(ids(block), RequestId(f"req-{block}")) for block in range(4)]
        for connection in used:
            await connection.write(0, ids(1), (BlockId(used.index(connection)),))
        await used[0].fence()
        await used[0].close()
        await used[1].close()

    run(transport, scenario)  # what is loaded or opened once, such as an event loop's modules
    before = open_fds()
    run(transport, scenario)
    assert open_fds() <= before
    assert transfer_threads() == []
    assert not is_mapped()
