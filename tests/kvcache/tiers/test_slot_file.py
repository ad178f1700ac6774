"""What was written into a slot is read from it, by its name alone, however the disk serves it."""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from slot_rig import (
    PAYLOAD_BYTES,
    STAMP,
    content_of,
    file_bytes,
    header_of,
    is_served,
    name_of,
    opened,
    read_block,
    scanned,
    slots_from,
    write_blocks,
)

from baton.ids import BlockHash
from kvcache.tiers.disk import slot_file, slot_scan
from kvcache.tiers.disk.disk_calls import Buffers, DiskCalls, zero
from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.interface import Slot
from kvcache.tiers.pages import PAGE_BYTES, whole_pages
from kvcache.tiers.rows.host_memory import HostMemory


def names(count: int) -> list[BlockHash]:
    return [name_of(str(i)) for i in range(count)]


def on_disk(file: SlotFile) -> bytes:
    return file.path.read_bytes()


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "buffered":
        monkeypatch.setattr(slot_file, "open_direct", lambda _: None)
    return str(request.param)


def test_what_was_written_is_read(tmp_path: Path, way: str) -> None:
    with opened(tmp_path, 20) as file:
        assert way == "direct" or not file.is_direct
        write_blocks(file, 3, names(9))
        assert all(is_served(file, 3 + i, name) for i, name in enumerate(names(9)))
        assert {slot: header.name for slot, header in scanned(file).items()} == dict(enumerate(names(9), 3))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cut", [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES + 5])
def test_a_payload_is_read_in_parts(tmp_path: Path, cut: int) -> None:
    payload_bytes = 2 * PAGE_BYTES + 100
    rows = HostMemory(3, payload_bytes).rows
    rows[:] = np.random.default_rng(cut).integers(0, 256, rows.shape, np.uint8)
    slots, into = slots_from(1, 3), [Slot(2), Slot(0), Slot(1)]
    size_bytes = file_bytes(4, payload_bytes)
    with closing(SlotFile.open(tmp_path, size_bytes, STAMP, payload_bytes)) as file:
        file.write(slots, list(map(header_of, names(3))), rows, slots_from(0, 3))
        back = HostMemory(3, payload_bytes).rows
        wrong = [names(3)[0], name_of("another"), names(3)[2]]
        headers = file.read(slots, wrong, back, into, cut)
        assert headers == [header_of(wrong[0]), None, header_of(wrong[2])]
        assert np.array_equal(back[into, :cut], rows[:, :cut])
        assert not back[:, whole_pages(cut) :].any(), "no more than was asked for"
        file.read_on(slots, back, into, range(cut, payload_bytes))
        assert np.array_equal(back[into], rows)


@pytest.mark.usefixtures("way")
def test_scattered_slots_into_scattered_rows(tmp_path: Path) -> None:
    random = Random(5)
    slots, rows = [Slot(slot) for slot in range(40)], [Slot(row) for row in range(40)]
    random.shuffle(rows)
    slots = slots[10:25] + random.sample(slots[:10] + slots[25:], 25)  # a run, and single ones
    memory = HostMemory(40, PAYLOAD_BYTES)
    for row, name in zip(rows, names(40), strict=True):
        memory.rows[row] = content_of(name)
    with opened(tmp_path, 40) as file:
        file.write(slots, list(map(header_of, names(40))), memory.rows, rows)
        back = HostMemory(40, PAYLOAD_BYTES)
        order = random.sample(range(40), 40)
        headers = file.read([slots[i] for i in order], [names(40)[i] for i in order], back.rows, slots_from(0, 40))
        assert headers == [header_of(names(40)[i]) for i in order]
        assert np.array_equal(back.rows, memory.rows[[rows[i] for i in order]])


def test_runs_longer_than_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_file, "RUN_BYTES_MAX", 5 * (file_bytes(1) - file_bytes(0)))
    sizes: list[int] = []

    def pwritev(file: int, buffers: Buffers, offset: int) -> int:
        sizes.append(len(buffers))
        return os.pwritev(file, buffers, offset)

    with opened(tmp_path, 13, calls=DiskCalls(pwritev=pwritev)) as file:
        sizes.clear()
        write_blocks(file, 0, names(13))
        assert sizes == [10, 10, 6]
        assert all(is_served(file, slot, name) for slot, name in enumerate(names(13)))


def test_a_slot_is_read_by_its_name_alone(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as file:
        write_blocks(file, 0, names(3))
        memory = HostMemory(4, PAYLOAD_BYTES)
        wanted = [names(3)[0], name_of("another"), names(3)[2], name_of("never written")]
        headers = file.read(slots_from(0, 4), wanted, memory.rows, slots_from(0, 4))
        assert headers == [header_of(wanted[0]), None, header_of(wanted[2]), None]


def test_a_slot_written_anew_holds_the_new_block_only(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as file:
        write_blocks(file, 0, names(4))
        write_blocks(file, 1, [name_of("new")])
        assert is_served(file, 1, name_of("new")) and not is_served(file, 1, names(4)[1])
        assert is_served(file, 0, names(4)[0]) and is_served(file, 2, names(4)[2])


@pytest.mark.usefixtures("way")
def test_it_is_all_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as file:
        path = file.path
        write_blocks(file, 0, names(8))
    with opened(tmp_path, 8) as file:
        assert file.path == path
        assert scanned(file) == {Slot(slot): header_of(name) for slot, name in enumerate(names(8))}
        assert all(is_served(file, slot, name) for slot, name in enumerate(names(8)))


def test_erased_slots_are_blank_on_the_disk(tmp_path: Path) -> None:
    ranges: list[tuple[int, int]] = []

    def zero(_: int, offset: int, size_bytes: int) -> None:
        ranges.append((offset, size_bytes))

    with opened(tmp_path, 8, calls=DiskCalls(zero=zero)) as file:
        write_blocks(file, 0, names(8))
        file.erase([Slot(2), Slot(5), Slot(6)])
        assert sorted(scanned(file)) == [0, 1, 3, 4, 7]
        assert read_block(file, 2, names(8)[2])[0] is None
        assert {i for i, name in enumerate(names(8)) if bytes(name) in on_disk(file)} == {0, 1, 3, 4, 7}
        slot = file_bytes(1) - file_bytes(0)
        assert ranges == [(file_bytes(2), slot), (file_bytes(5), 2 * slot)]


def test_erasing_all_leaves_no_name_on_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as file:
        write_blocks(file, 0, names(8))
        file.erase_all()
        assert not scanned(file) and not any(is_served(file, slot, name) for slot, name in enumerate(names(8)))
        assert not any(bytes(name) in on_disk(file) for name in names(8))
        write_blocks(file, 0, names(2))
        assert is_served(file, 1, names(2)[1])
    with opened(tmp_path, 8) as file:
        assert sorted(scanned(file)) == [0, 1]


def test_zeroing_gives_up_a_range_and_nothing_else(tmp_path: Path) -> None:
    """Where the file system can; where it cannot, nothing happens."""
    path = tmp_path / "data"
    path.write_bytes(b"x" * 5 * 4096)
    fd = os.open(path, os.O_RDWR)
    try:
        zero(fd, 4096, 2 * 4096)
        with pytest.raises(OSError, match="Invalid argument"):
            zero(fd, -1, 4096)
    finally:
        os.close(fd)
    pages = [set(path.read_bytes()[page : page + 4096]) for page in range(0, 5 * 4096, 4096)]
    assert pages in ([{120}, {0}, {0}, {120}, {120}], [{120}] * 5)


def test_a_new_generation_empties_slots_whose_headers_are_still_there(tmp_path: Path) -> None:
    """As a crash in the middle of erasing all leaves them."""
    with opened(tmp_path, 4) as file:
        write_blocks(file, 0, names(4))
        pages = file.path.read_bytes()
        file.erase_all()
        with file.path.open("r+b") as raw:
            raw.seek(file_bytes(0))
            raw.write(pages[file_bytes(0) :])
        assert not scanned(file)
        assert not any(is_served(file, slot, name) for slot, name in enumerate(names(4)))


def test_a_scan_tells_in_order_and_stops_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_scan, "BATCH_SLOTS", 4)
    with opened(tmp_path, 18) as file:
        write_blocks(file, 0, names(18))
        assert list(scanned(file)) == list(range(18))
        found: list[Slot] = []
        file.scan(lambda slot, _: found.append(slot), lambda: len(found) > 6)
        assert found == list(range(8))


@pytest.mark.parametrize("seed", range(8))
def test_calls_that_stop_half_way_go_on(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_file, "open_direct", lambda _: None)  # any number of bytes at a time
    random = Random(seed)

    def some(buffers: Buffers) -> Sequence[memoryview]:
        """What comes first of them, cut off anywhere."""
        count = random.randint(1, len(buffers))
        last = buffers[count - 1]
        return [*buffers[: count - 1], last[: random.randint(1, len(last))]]

    calls = DiskCalls(
        preadv=lambda file, buffers, offset: os.preadv(file, some(buffers), offset),
        pwritev=lambda file, buffers, offset: os.pwritev(file, some(buffers), offset),
    )
    with opened(tmp_path, 9, calls=calls) as file:
        write_blocks(file, 0, names(9))
        assert all(is_served(file, slot, name) for slot, name in enumerate(names(9)))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_says_so(tmp_path: Path, code: int) -> None:
    is_failing = False

    def pwritev(file: int, buffers: Buffers, offset: int) -> int:
        if is_failing:
            raise OSError(code, os.strerror(code))
        return os.pwritev(file, buffers, offset)

    def preadv(file: int, buffers: Buffers, offset: int) -> int:
        if is_failing:
            raise OSError(code, os.strerror(code))
        return os.preadv(file, buffers, offset)

    with opened(tmp_path, 4, calls=DiskCalls(preadv=preadv, pwritev=pwritev)) as file:
        write_blocks(file, 0, names(4))
        is_failing = True
        for attempt in (
            lambda: write_blocks(file, 0, names(2)),
            lambda: is_served(file, 0, names(1)[0]),
            lambda: file.erase([Slot(0)]),
            file.erase_all,
            lambda: scanned(file),
        ):
            with pytest.raises(OSError, match=r".") as caught:
                attempt()
            assert caught.value.errno == code
        is_failing = False
        assert is_served(file, 3, names(4)[3])


def test_a_disk_that_takes_nothing_is_no_endless_loop(tmp_path: Path) -> None:
    is_stuck = False

    def pwritev(file: int, buffers: Buffers, offset: int) -> int:
        return 0 if is_stuck else os.pwritev(file, buffers, offset)

    with opened(tmp_path, 4, calls=DiskCalls(pwritev=pwritev)) as file:
        is_stuck = True
        with pytest.raises(OSError, match="takes no more"):
            write_blocks(file, 0, names(2))


def test_a_file_that_somebody_cut_short_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as file:
        write_blocks(file, 0, names(4))
        os.truncate(file.path, file_bytes(2))
        with pytest.raises(OSError, match="ends here"):
            is_served(file, 3, names(4)[3])
        with pytest.raises(OSError, match="ends here"):
            scanned(file)


def test_threads_in_slots_of_their_own(tmp_path: Path) -> None:
    with opened(tmp_path, 32) as file, ThreadPoolExecutor(4) as pool:

        def rounds(thread: int) -> None:
            random = Random(thread)
            for number in range(30):
                first, count = 8 * thread + random.randint(0, 4), random.randint(1, 4)
                written = [name_of(f"{thread} {number} {i}") for i in range(count)]
                write_blocks(file, first, written)
                assert all(is_served(file, slot, name) for slot, name in enumerate(written, first))

        list(pool.map(rounds, range(4)))


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_without_direct_io(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = getattr(os, call)

    def refuse(*arguments: Any) -> Any:
        if call == "preadv" or arguments[1] & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*arguments)

    monkeypatch.setattr(os, call, refuse)
    with opened(tmp_path, 4) as file:
        assert not file.is_direct
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        write_blocks(file, 0, names(4))
        assert all(is_served(file, slot, name) for slot, name in enumerate(names(4)))


def test_closing_twice_is_closing(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as file:
        file.close()
