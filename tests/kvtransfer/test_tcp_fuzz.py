"""Malformed frames against the real listener: each costs one connection, and nothing stays behind."""

import asyncio
import random
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcp_rig import (
    LAYOUT,
    LOOPS,
    Run,
    check_serves,
    hello_frame,
    open_sockets,
    raw,
    read_challenge,
    read_to_the_end,
    receiving,
    region_of,
    runner,
    sending,
)
from tls_certificates import tls_files
from transfer_rig import REQUEST, ids, slices

from kvtransfer.control import Address
from kvtransfer.tcp.patience import Patience
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.wire import Header, Kind
from kvtransfer.tls import TlsFiles

SHORT = Patience(hello_s=0.03, stall_s=0.03, idle_s=0.03, linger_s=0.03)
TICKET = (3, 4, 5, 9)
PAYLOAD = random.Random(5).randbytes(2 * len(TICKET) * LAYOUT.slice_bytes)

fuzzing = settings(max_examples=30, deadline=None)
loops = st.sampled_from(sorted(LOOPS))
splits = st.lists(st.integers(1, 900), min_size=1, max_size=10)


def valid_stream(address: Address, challenge: bytes) -> bytes:
    head = Header(Kind.SLICES, address.ticket, 1, len(TICKET)).pack() + struct.pack(f"!{len(TICKET)}I", *TICKET)
    fence = Header(Kind.FENCE, address.ticket, count=2).pack()
    return hello_frame(address, challenge) + head + PAYLOAD + fence


async def pour(writer: asyncio.StreamWriter, data: bytes, pieces: Sequence[int]) -> None:
    """In pieces, each of which may arrive alone, until the receiver hangs up."""
    start = i = 0
    try:
        while start < len(data):
            size = pieces[i % len(pieces)]
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
            start, i = start + size, i + 1
    except ConnectionError:
        pass


async def check_nothing_is_left(receiver: TcpReceiver) -> None:
    for inflow in tuple(receiver._inflows):
        await inflow.ended.wait()
    assert {task for task in asyncio.all_tasks() if "_shake_hands" in repr(task)} == set()
    outside = [block for block in range(LAYOUT.blocks) if block not in TICKET]
    assert not slices(region_of(receiver))[:, :, outside].any()


async def check_survives(stranger: bytes, pieces: Sequence[int], tls: TlsFiles | None = None) -> None:
    before = open_sockets()
    async with receiving(SHORT, tls=tls) as receiver:
        listening = open_sockets()
        async with raw(receiver) as (reader, writer):
            await pour(writer, stranger, pieces)
            await read_to_the_end(reader)
        await check_nothing_is_left(receiver)
        assert open_sockets() <= listening
        async with sending(tls=tls) as sender:
            await check_serves(receiver, sender)
        for inflow in tuple(receiver._inflows):
            await inflow.ended.wait()
        assert not slices(region_of(receiver)).any()
    for _ in range(3):
        await asyncio.sleep(0)
    assert open_sockets() <= before


frames = st.builds(
    lambda kind, ticket, layer, count, body: Header(kind, ticket, layer, count).pack() + body,
    st.integers(0, 9),
    st.integers(0, 3) | st.integers(0, 2**64 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 5) | st.integers(0, 2**32 - 1),
    st.binary(max_size=100),
)


@fuzzing
@given(loops, st.binary(min_size=1, max_size=600) | st.lists(frames, min_size=1, max_size=6).map(b"".join), splits)
def test_garbage_costs_only_its_connection(loop: str, garbage: bytes, pieces: list[int]) -> None:
    runner(loop)(check_survives(garbage, pieces))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    folder: Path = tmp_path_factory.mktemp("tls")
    return tls_files(folder)


@settings(max_examples=15, deadline=None)
@given(loop=loops, garbage=st.binary(min_size=1, max_size=3000), pieces=splits, is_record=st.booleans())
def test_garbage_instead_of_tls_costs_only_its_connection(
    tls: TlsFiles, loop: str, garbage: bytes, pieces: list[int], is_record: bool
) -> None:
    record = b"\x16\x03\x01" + struct.pack("!H", len(garbage)) if is_record else b""
    runner(loop)(check_survives(record + garbage, pieces, tls))


async def check_mutated(changes: Sequence[tuple[int, int]], cut: int, pieces: Sequence[int]) -> None:
    async with receiving(SHORT) as receiver:
        async with raw(receiver) as (reader, writer):
            (offer,) = receiver.open(REQUEST, ids(*TICKET))
            stream = bytearray(valid_stream(Address.unpack(offer.descriptor), await read_challenge(reader)))
            for position, value in changes:
                stream[position % len(stream)] ^= value
            await pour(writer, bytes(stream[: cut % (len(stream) + 1)]), pieces)
            receiver.close_ticket(REQUEST)
            await receiver.settle(REQUEST)
            settled = bytes(region_of(receiver).memory)
            await read_to_the_end(reader)
        await check_nothing_is_left(receiver)
        assert bytes(region_of(receiver).memory) == settled
        async with sending() as sender:
            await check_serves(receiver, sender)


@fuzzing
@given(loops, st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), max_size=4), st.integers(0, 5000), splits)
def test_a_valid_stream_changed_and_cut_lands_within_its_ticket_or_not_at_all(
    loop: str, changes: list[tuple[int, int]], cut: int, pieces: list[int]
) -> None:
    runner(loop)(check_mutated(changes, cut, pieces))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_valid_stream_is_one(loop: str) -> None:
    """Else the mutations above would test nothing."""

    async def scenario() -> None:
        async with receiving() as receiver, raw(receiver) as (reader, writer):
            (offer,) = receiver.open(REQUEST, ids(*TICKET))
            await pour(writer, valid_stream(Address.unpack(offer.descriptor), await read_challenge(reader)), [7, 500])
            await reader.readexactly(Header.FORMAT.size + 32)
            acknowledged = Header.unpack(await reader.readexactly(Header.FORMAT.size))
            assert acknowledged == Header(Kind.ACK, 1, count=2)
            sent = np.frombuffer(PAYLOAD, np.uint8).reshape(2, len(TICKET), LAYOUT.slice_bytes)
            assert (slices(region_of(receiver))[1][:, TICKET] == sent).all()

    runner(loop)(scenario())


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return runner(request.param)


@pytest.mark.parametrize("begins", [b"x", Header(Kind.SLICES, 1, 0, 2**32 - 1).pack(), Header(2**16 - 1, 1).pack()])
def test_a_flood_is_not_kept(run: Run, begins: bytes) -> None:
    async def scenario() -> None:
        flood = begins + bytes(16 * 2**20)
        async with receiving() as receiver, raw(receiver) as (reader, writer):
            await read_challenge(reader)
            tracemalloc.start()
            before, _ = tracemalloc.get_traced_memory()
            await pour(writer, flood, [2**20])
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak - before < 6 * 2**20  # the stranger's own piece, twice, and its writer's buffer
            (inflow,) = receiver._inflows
            inflow.cut()

    run(scenario())


def test_many_strangers_leave_nothing(run: Run) -> None:
    async def scenario() -> None:
        async with receiving(SHORT) as receiver:
            before = open_sockets()
            for i in range(100):
                async with raw(receiver) as (_, writer):
                    writer.write(bytes([i]) * i)
            await check_nothing_is_left(receiver)
            assert open_sockets() <= before
            async with sending() as sender:
                await check_serves(receiver, sender)

    run(scenario())
