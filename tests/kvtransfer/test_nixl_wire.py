"""What control connections say, and what they make of anything else."""

import asyncio
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.control import Address, Fault
from kvtransfer.nixl.agent import Source
from kvtransfer.nixl.channel import Channel, Frame, Lost, Malformed
from kvtransfer.nixl.proof import NONCE_BYTES, Greeting, Role, draw_nonce, ticket_key
from kvtransfer.nixl.segment import DEVICE, HOST, Segment, segment_of, slice_indices
from kvtransfer.nixl.wire import Header, Hello, Kind, pack_source, unpack_source
from kvtransfer.region import HostRegion

LAYOUT = KVLayout(layers=2, blocks=5, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")
SOURCE = Source(LAYOUT, Segment(DEVICE, 1 << 40, LAYOUT.region_bytes, 3), "agent", b"metadata")


class FakeWriter:
    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.reader = reader
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)
        self.reader.feed_data(data)

    def is_closing(self) -> bool:
        return False

    def write_eof(self) -> None:
        self.reader.feed_eof()


def ends() -> tuple[Channel, Channel, FakeWriter]:
    """From the first to the second."""
    there, back = asyncio.StreamReader(), asyncio.StreamReader()
    writer: Any = FakeWriter(there)
    other: Any = FakeWriter(back)
    return Channel(back, writer), Channel(there, other), writer


def greeting(cluster: bytes | None = b"cluster", ticket: bytes = b"ticket", challenge: bytes = b"c" * 32) -> Greeting:
    return Greeting(Hello(7, bytes(NONCE_BYTES), bytes(16)).pack(), challenge, ticket_key(cluster, ticket))


def test_what_is_packed_unpacks_the_same() -> None:
    assert unpack_source(pack_source(SOURCE)) == SOURCE
    hello = Hello(2**40, draw_nonce(), bytes(range(16)))
    assert Hello.unpack(hello.pack()) == hello
    address = Address("host-1", 4711, 2**33, bytes(16))
    assert Address.unpack(address.pack()) == address
    header = Header(Kind.READY, 24, layer=3, count=3)
    assert Header.unpack(header.pack()) == header


@given(st.binary(max_size=400))
def test_anything_else_is_refused_and_nothing_worse(data: bytes) -> None:
    for unpack in (unpack_source, Address.unpack):
        with suppress(TransferError):
            unpack(data)
    Hello.unpack(data)
    assert len(data) != Header.FORMAT.size or Header.unpack(data) is None


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_source_is_refused_or_unlike(position: int, change: int) -> None:
    packed = bytearray(pack_source(SOURCE))
    packed[position % len(packed)] ^= change
    try:
        assert (unpack_source(bytes(packed)) == SOURCE) == (change == 0)
    except TransferError:
        assert change


def test_a_source_whose_size_is_not_its_layouts_is_refused() -> None:
    for segment in (Segment(HOST, 4096, LAYOUT.region_bytes - 1, 0), Segment(9, 4096, LAYOUT.region_bytes, 0)):
        with pytest.raises(TransferError, match="memory"):
            unpack_source(pack_source(Source(LAYOUT, segment, "agent", b"")))
    with pytest.raises(TransferError, match="memory"):
        unpack_source(pack_source(Source(LAYOUT, Segment(HOST, 2**64 - 8, LAYOUT.region_bytes, 0), "agent", b"")))


def test_proofs_are_of_one_secret_one_role_and_one_connection() -> None:
    proof = greeting().proof(Role.SENDER, b"source")
    assert greeting().is_proven(proof, Role.SENDER, b"source")
    assert not greeting().is_proven(proof, Role.SENDER, b"sourcf")
    assert not greeting().is_proven(proof, Role.RECEIVER, b"source")
    assert not greeting(cluster=None).is_proven(proof, Role.SENDER, b"source")
    assert not greeting(ticket=b"other").is_proven(proof, Role.SENDER, b"source")
    assert not greeting(challenge=b"d" * 32).is_proven(proof, Role.SENDER, b"source")
    assert repr(greeting().key) not in repr(greeting())


def test_sealed_frames_arrive_in_order_or_not_at_all() -> None:
    async def scenario(tamper: Any, expected: type[Exception] | None) -> None:
        sender, receiver, writer = ends()
        sender.seal(greeting(), Role.SENDER)
        receiver.seal(greeting(), Role.RECEIVER)
        sender.send(Kind.READY, b"12345678", layer=1, count=1)
        assert await receiver.receive() == Frame(Kind.READY, b"12345678", 1, 1)
        sender.send(Kind.FENCE)
        await receiver._reader.readexactly(len(writer.sent[1]))
        receiver._reader.feed_data(tamper(writer.sent))
        if expected is None:
            assert (await receiver.receive()).kind == Kind.FENCE
            return
        with pytest.raises(expected):
            await receiver.receive()

    asyncio.run(scenario(lambda sent: sent[1], None))
    asyncio.run(scenario(lambda sent: sent[0], Malformed))
    asyncio.run(scenario(lambda sent: sent[1][:-1] + bytes([sent[1][-1] ^ 1]), Malformed))
    asyncio.run(scenario(lambda sent: b"BNX1" + bytes(12) + sent[1][16:], Malformed))


def test_a_refusal_needs_no_seal_and_is_the_last_frame() -> None:
    async def scenario() -> None:
        sender, receiver, _ = ends()
        receiver.seal(greeting(), Role.RECEIVER)
        sender.refuse(Fault.TICKET_CLOSED)
        assert await receiver.receive() == Frame(Kind.ERROR, count=Fault.TICKET_CLOSED)
        with pytest.raises(Lost):
            await receiver.receive()

    asyncio.run(scenario())


def test_a_frame_longer_than_the_bound_is_no_frame() -> None:
    async def scenario() -> None:
        _, receiver, writer = ends()
        writer.write(Header(Kind.READY, 2**30).pack())
        with pytest.raises(Malformed):
            await receiver.receive()

    asyncio.run(scenario())


def test_slices_are_numbered_as_the_region_lies() -> None:
    indices = slice_indices(LAYOUT, 1, np.array([4, 0], np.int32))
    places = [LAYOUT.slice_offset(1, kv, block) // LAYOUT.slice_bytes for kv in (0, 1) for block in (4, 0)]
    assert indices.tolist() == places


def test_host_memory_is_where_it_is_and_device_memory_where_it_says() -> None:
    class OnDevice(HostRegion):
        is_host = False

        def device_address(self) -> tuple[int, int] | None:
            return 1 << 40, 2

        def ready(self, layer: int) -> None:
            del layer

    class Staged(HostRegion):
        is_host = False

    regions = [kind.allocate(LAYOUT) for kind in (HostRegion, OnDevice, Staged)]
    host, device, staged = regions
    assert (segment_of(host).mem_type, segment_of(host).size_bytes) == ("DRAM", LAYOUT.region_bytes)
    assert segment_of(device) == Segment(DEVICE, 1 << 40, LAYOUT.region_bytes, 2)
    assert segment_of(device).mem_type == "VRAM"
    with pytest.raises(TransferError, match="NIXL cannot reach"):
        segment_of(staged)
    for region in regions:
        region.close()
