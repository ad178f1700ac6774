"""Bits that flip on the disk are seen: in a header, a superblock, or by the digest of the payload."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from slot_rig import PAYLOAD_BYTES, file_bytes, is_served, name_of, open_file, opened, scanned, write_blocks

from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.disk.slot_format import HEADER_BYTES, HEADERS_OFFSET
from kvcache.tiers.pages import PAGE_BYTES

SLOTS = 6
NAMES = [name_of(f"flip {i}") for i in range(SLOTS)]
SLOT_BYTES = file_bytes(1) - file_bytes(0)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SlotFile]:
    with opened(tmp_path, SLOTS) as file:
        write_blocks(file, 0, NAMES)
        yield file


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    flip(path, bit)
    yield
    flip(path, bit)


def flip(path: Path, bit: int) -> None:
    fd = os.open(path, os.O_RDWR)
    (byte,) = os.pread(fd, 1, bit // 8)
    os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)
    os.close(fd)


def served(file: SlotFile) -> list[int]:
    return [slot for slot, name in enumerate(NAMES) if is_served(file, slot, name)]


def test_every_bit_of_a_header(file: SlotFile) -> None:
    start = HEADERS_OFFSET + 2 * SLOT_BYTES
    for bit in range(8 * start, 8 * (start + HEADER_BYTES)):
        with flipped(file.path, bit):
            assert not is_served(file, 2, NAMES[2])
    assert served(file) == list(range(SLOTS))


def test_bits_all_over_the_slots(file: SlotFile) -> None:
    random = Random(31)
    for bit in random.sample(range(8 * HEADERS_OFFSET, 8 * file_bytes(SLOTS)), 1500):
        slot, place = divmod(bit // 8 - HEADERS_OFFSET, SLOT_BYTES)
        is_used = place < HEADER_BYTES or PAGE_BYTES <= place < PAGE_BYTES + PAYLOAD_BYTES
        with flipped(file.path, bit):
            assert is_served(file, slot, NAMES[slot]) is not is_used, f"bit {bit}"
    assert served(file) == list(range(SLOTS))


def test_a_superblock_has_a_mirror(file: SlotFile, tmp_path: Path) -> None:
    file.close()
    for bit in Random(7).sample(range(8 * HEADERS_OFFSET), 100):
        with flipped(file.path, bit), opened(tmp_path, SLOTS) as again:
            assert served(again) == list(range(SLOTS))


def test_without_either_superblock_nothing_is_served(file: SlotFile, tmp_path: Path) -> None:
    file.close()
    for page in range(2):
        flip(file.path, 8 * (page * PAGE_BYTES + 20))
    with opened(tmp_path, SLOTS) as again:
        assert not scanned(again) and not served(again)


def test_slots_that_were_moved(file: SlotFile) -> None:
    """A header says whose block follows, not where: the digest of another slot's payload is another."""
    data = bytearray(file.path.read_bytes())
    first, second = (HEADERS_OFFSET + slot * SLOT_BYTES + PAGE_BYTES for slot in (0, 1))
    pages = SLOT_BYTES - PAGE_BYTES
    data[first : first + pages], data[second : second + pages] = (
        data[second : second + pages],
        data[first : first + pages],
    )
    file.path.write_bytes(data)
    assert served(file) == list(range(2, SLOTS))


def test_a_slot_file_of_another_worker_copied_over_this_one(file: SlotFile, tmp_path: Path) -> None:
    other = open_file(tmp_path / "other", SLOTS)
    write_blocks(other, 0, NAMES)
    other.close()
    with file.path.open("r+b") as raw:
        raw.seek(HEADERS_OFFSET)
        raw.write(other.path.read_bytes()[HEADERS_OFFSET:])
    assert not scanned(file) and not served(file)  # another generation
