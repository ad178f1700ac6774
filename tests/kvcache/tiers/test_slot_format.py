"""Headers and superblocks come back as they were packed, or not at all."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slot_rig import LAYOUT, OTHER_STAMP, STAMP

from baton.ids import BlockHash, TenantTag
from kvcache.tiers.disk.slot_format import (
    HEADER_BYTES,
    HeaderFormat,
    Superblock,
    file_stamp,
    pack_superblock,
    unpack_superblock,
)
from kvcache.tiers.interface import SlotHeader
from kvcache.tiers.pages import PAGE_BYTES

WORD = st.integers(0, 2**64 - 1)
SUPERBLOCKS = st.builds(
    Superblock, st.sampled_from([STAMP, OTHER_STAMP]), st.integers(1, 2**40), st.integers(1, 2**40), WORD
)
HEADERS = st.builds(
    SlotHeader,
    name=st.binary(min_size=16, max_size=16).map(BlockHash),
    parent=st.binary(min_size=16, max_size=16).map(BlockHash),
    depth=st.integers(0, 2**32 - 1),
    digest=WORD,
    storage=st.sampled_from(["none", "int8"]),
    tenant=st.binary(min_size=8, max_size=8).map(TenantTag),
    keep_until=st.floats(0, allow_nan=False),
)
SUPERBLOCK = Superblock(STAMP, 7, 2304, 41)
HEADER = SlotHeader(BlockHash(b"n" * 16), BlockHash(b"p" * 16), 3, 2**63 + 1, "int8", TenantTag(b"t" * 8), 9.5)


@given(SUPERBLOCKS)
def test_a_superblock_comes_back(superblock: Superblock) -> None:
    page = pack_superblock(superblock)
    assert len(page) == PAGE_BYTES
    assert unpack_superblock(page) == superblock


@given(HEADERS, SUPERBLOCKS)
def test_a_header_comes_back(header: SlotHeader, superblock: Superblock) -> None:
    form = HeaderFormat(superblock)
    page = form.pack(header)
    assert len(page) == PAGE_BYTES
    assert form.unpack(page) == form.unpack(page[:HEADER_BYTES]) == header


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_anything_else_is_nothing(page: bytes) -> None:
    assert HeaderFormat(SUPERBLOCK).unpack(page) is None
    assert unpack_superblock(page) is None


def test_every_bit_of_a_header_and_of_a_superblock_counts() -> None:
    form = HeaderFormat(SUPERBLOCK)
    header, superblock = bytearray(form.pack(HEADER)[:HEADER_BYTES]), bytearray(pack_superblock(SUPERBLOCK))
    for bit in range(8 * HEADER_BYTES):
        header[bit // 8] ^= 1 << bit % 8
        assert form.unpack(bytes(header)) is None
        header[bit // 8] ^= 1 << bit % 8
    for bit in range(8 * len(bytes(superblock).rstrip(b"\0"))):
        superblock[bit // 8] ^= 1 << bit % 8
        assert unpack_superblock(bytes(superblock)) is None
        superblock[bit // 8] ^= 1 << bit % 8
    assert (form.unpack(bytes(header)), unpack_superblock(bytes(superblock))) == (HEADER, SUPERBLOCK)


@pytest.mark.parametrize(
    "other",
    [
        replace(SUPERBLOCK, generation=42),
        replace(SUPERBLOCK, stamp=OTHER_STAMP),
        replace(SUPERBLOCK, payload_bytes=2305),
    ],
)
def test_a_slot_of_another_file_or_generation_is_empty(other: Superblock) -> None:
    assert HeaderFormat(SUPERBLOCK).unpack(HeaderFormat(other).pack(HEADER)) is None


def test_a_blank_page_is_empty() -> None:
    assert HeaderFormat(SUPERBLOCK).unpack(bytes(PAGE_BYTES)) is None
    assert unpack_superblock(bytes(PAGE_BYTES)) is None


def test_a_stamp_stands_for_all_that_makes_slots_interchangeable() -> None:
    others = [
        file_stamp("b", LAYOUT, "none", 100),
        file_stamp("a", LAYOUT, "int8", 100),
        file_stamp("a", LAYOUT, "none", 101),
        file_stamp("a", replace(LAYOUT, layers=4), "none", 100),
        file_stamp("a", replace(LAYOUT, block_tokens=8), "none", 100),
        file_stamp("a", replace(LAYOUT, kv_heads=2), "none", 100),
        file_stamp("a", replace(LAYOUT, head_dim=16), "none", 100),
        file_stamp("a", replace(LAYOUT, dtype="float16"), "none", 100),
    ]
    stamp = file_stamp("a", LAYOUT, "none", 100)
    assert stamp == file_stamp("a", replace(LAYOUT, blocks=1000), "none", 100)  # the pool's size is its own affair
    assert len({stamp, *others}) == 9
