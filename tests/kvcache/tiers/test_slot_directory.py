"""Each worker has a file of its own, its own again after a restart, and room is made only by what nobody uses."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest
from slot_rig import (
    OTHER_STAMP,
    PAYLOAD_BYTES,
    STAMP,
    file_bytes,
    is_served,
    name_of,
    open_file,
    opened,
    scanned,
    write_blocks,
)

from baton.errors import SettingsError
from kvcache.tiers.disk import slot_directory
from kvcache.tiers.disk.disk_calls import DiskCalls
from kvcache.tiers.disk.slot_file import SlotFile
from kvcache.tiers.disk.slot_format import FileStamp, Superblock
from kvcache.tiers.pages import PAGE_BYTES

NAMES = [name_of(str(i)) for i in range(8)]


class Disk(NamedTuple):
    """Of what os.statvfs says."""

    f_bavail: int
    f_blocks: int
    f_frsize: int


def fill(directory: Path, stamp: FileStamp = STAMP, slots: int = 8) -> Path:
    with opened(directory, slots, stamp=stamp) as file:
        write_blocks(file, 0, NAMES)
        return file.path


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def disk_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes the disk of a directory seem to have so many bytes beside what its files take."""

    def limit(directory: Path, size_bytes: int) -> None:
        def statvfs(_: Path) -> Disk:
            taken = sum(file.stat().st_size for file in directory.iterdir())
            return Disk(size_bytes - taken, size_bytes, 1)

        monkeypatch.setattr(os, "statvfs", statvfs)
        monkeypatch.setattr(slot_directory, "FREE_SHARE", 0.0)

    return limit


def test_the_file_has_its_size_from_the_start(tmp_path: Path) -> None:
    with closing(SlotFile.open(tmp_path / "deep" / "er", file_bytes(5) + 100, STAMP, PAYLOAD_BYTES)) as file:
        assert file.slots == 5 and file.size_bytes == file_bytes(5)
        status = file.path.stat()
        assert status.st_size == file_bytes(5) <= status.st_blocks * 512
        assert status.st_mode & 0o777 == 0o600
        assert not scanned(file)


def test_two_workers_never_share_one_and_find_theirs_again(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as one, opened(tmp_path, 8) as two:
        assert {one.path.name, two.path.name} == {"kv-0.slots", "kv-1.slots"}
        write_blocks(one, 0, NAMES)
    with opened(tmp_path, 8) as one, opened(tmp_path, 8) as two:
        assert len(scanned(one)) == 8 and not scanned(two)
    assert files(tmp_path) == ["kv-0.slots", "kv-1.slots"]


def test_workers_that_start_together_get_one_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        opened_files = list(pool.map(lambda _: open_file(tmp_path, 4), range(16)))
        for file in opened_files:
            stack.callback(file.close)
        assert len({file.path for file in opened_files}) == 16
        assert all(file.path.stat().st_size == file_bytes(4) for file in opened_files)


def test_a_file_of_another_model_is_left_for_it(tmp_path: Path) -> None:
    fill(tmp_path, OTHER_STAMP)
    with opened(tmp_path, 8) as file:
        assert not scanned(file)
    with opened(tmp_path, 8, stamp=OTHER_STAMP) as file:
        assert len(scanned(file)) == 8


def test_a_look_at_a_file_does_not_keep_its_worker_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = fill(tmp_path, OTHER_STAMP)
    real, looks = slot_directory.superblock_of, 0

    def superblock_of(fd: int) -> Superblock | None:
        """While one worker looks, the other starts."""
        nonlocal looks
        looks += 1
        if looks == 1:
            with opened(tmp_path, 8, stamp=OTHER_STAMP) as file:
                assert file.path == others
        return real(fd)

    monkeypatch.setattr(slot_directory, "superblock_of", superblock_of)
    with opened(tmp_path, 8) as file:
        assert file.path != others and looks > 1


def test_where_it_is_in_the_way_it_goes(tmp_path: Path, disk_of: Callable[[Path, int], None]) -> None:
    paths = [fill(tmp_path, stamp) for stamp in (OTHER_STAMP, FileStamp(bytes(32)), FileStamp(b"\1" * 32))]
    for path, used_s in zip(paths, (20, 10, 30), strict=True):
        os.utime(path, (used_s, used_s))
    disk_of(tmp_path, 3 * file_bytes(8) + 100)
    with opened(tmp_path, 8) as file:
        assert file.path == paths[1]  # the one unused for longest is gone, and its number free
        assert not scanned(file)
    with opened(tmp_path, 8, stamp=OTHER_STAMP) as file:
        assert len(scanned(file)) == 8


def test_a_file_in_use_is_never_in_the_way(tmp_path: Path, disk_of: Callable[[Path, int], None]) -> None:
    with opened(tmp_path, 8, stamp=OTHER_STAMP) as other:
        write_blocks(other, 0, NAMES)
        disk_of(tmp_path, file_bytes(8) + 100)
        with opened(tmp_path, 8):  # the disk has room in truth
            assert files(tmp_path) == ["kv-0.slots", "kv-1.slots"]
        assert is_served(other, 7, NAMES[7])


def test_a_share_of_the_disk_stays_free_while_others_can_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, OTHER_STAMP)
    room = file_bytes(8)
    monkeypatch.setattr(os, "statvfs", lambda _: Disk(room + 10, 1000, 1))
    with opened(tmp_path, 8):
        assert files(tmp_path) == ["kv-0.slots"]


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES, file_bytes(8)])
def test_a_file_that_was_never_completed_goes(tmp_path: Path, size: int) -> None:
    (tmp_path / "kv-0.slots").write_bytes(bytes(size))
    (tmp_path / "kv-notes.txt").write_text("not ours")
    with opened(tmp_path, 8) as file:
        assert file.path.name == "kv-0.slots" and not scanned(file)
    assert files(tmp_path) == ["kv-0.slots", "kv-notes.txt"]


@pytest.mark.parametrize("slots", [4, 20])
def test_another_size_keeps_what_fits(tmp_path: Path, slots: int) -> None:
    fill(tmp_path)
    for _ in range(2):
        with opened(tmp_path, slots) as file:
            assert file.slots == slots and file.path.stat().st_size == file_bytes(slots)
            assert sorted(scanned(file)) == list(range(min(8, slots)))
            assert all(is_served(file, slot, NAMES[slot]) for slot in range(min(8, slots)))


def test_a_file_that_was_cut_short_is_whole_again(tmp_path: Path) -> None:
    os.truncate(fill(tmp_path), file_bytes(3))
    with opened(tmp_path, 8) as file:
        assert sorted(scanned(file)) == [0, 1, 2]
        write_blocks(file, 0, NAMES)
        assert is_served(file, 7, NAMES[7])


def test_a_disk_too_small_stops_the_start_and_leaves_nothing(tmp_path: Path) -> None:
    def allocate(file: int, offset: int, size_bytes: int) -> None:
        os.posix_fallocate(file, offset, size_bytes // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SettingsError, match=r"ssd_dir .* 0\.00 GiB: No space left on device\. Free some space"):
        open_file(tmp_path, 8, calls=DiskCalls(allocate=allocate))
    assert files(tmp_path) == []


def test_a_disk_too_small_to_grow_keeps_the_file(tmp_path: Path) -> None:
    fill(tmp_path)

    def allocate(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SettingsError, match="No space left"):
        open_file(tmp_path, 20, calls=DiskCalls(allocate=allocate))
    with opened(tmp_path, 8) as file:
        assert len(scanned(file)) == 8


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="ssd_dir"):
        open_file(tmp_path / "file", 8)
    with pytest.raises(SettingsError, match="ssd_dir"):
        open_file(tmp_path / "file" / "below", 8)


def test_too_small_for_a_block(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ssd_bytes is 1000, too small"):
        SlotFile.open(tmp_path, 1000, STAMP, PAYLOAD_BYTES)
