"""Which file of a directory is a worker's own.

A worker takes the first file of its stamp that no living worker has, so that one which was killed and started anew
finds its blocks again; only if there is none, it makes one. A file is locked (`flock`) for as long as it is open, so
two workers never share one, and the lock of a killed worker is gone with it.

A file of another stamp, of another model say, is left for whoever may come back to it, as long as the disk has room
for the new one beside it and FREE_SHARE of the disk stays free. Where it has not, the unlocked ones go, those that were
not used for longest first. A file without a superblock (its maker died, or the disk lost it) holds nothing that can be
found, and goes at once. A file of another size grows or shrinks to what the settings say, and keeps what fits.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from baton.errors import SettingsError
from kvcache.tiers.disk.disk_calls import DiskCalls
from kvcache.tiers.disk.slot_format import SUPERBLOCKS, Superblock, pack_superblock, unpack_superblock
from kvcache.tiers.pages import PAGE_BYTES

log = logging.getLogger(__name__)

FREE_SHARE = 0.05
FILES_MAX = 1024
"""In one directory: far more than workers on one machine."""


@dataclass(frozen=True, slots=True)
class LockedFile:
    """A slot file that this process alone has, until `close`."""

    path: Path
    fd: int
    """Buffered I/O."""

    @property
    def superblock(self) -> Superblock | None:
        """As it is now. Raises OSError."""
        return superblock_of(self.fd)

    def write_superblock(self, superblock: Superblock, calls: DiskCalls) -> None:
        """Raises OSError."""
        page = pack_superblock(superblock)
        for index in range(SUPERBLOCKS):
            calls.write(self.fd, [memoryview(page)], index * PAGE_BYTES)

    def remove(self, reason: str) -> None:
        """It stays locked until it is closed. Raises OSError."""
        log.warning("removed the KV file %s: %s", self.path.name, reason)
        self.path.unlink()

    def close(self) -> None:
        os.close(self.fd)


def superblock_of(fd: int) -> Superblock | None:
    """The newer of the two that are whole. Raises OSError."""
    pages = [os.pread(fd, PAGE_BYTES, index * PAGE_BYTES) for index in range(SUPERBLOCKS)]
    whole = [superblock for page in pages if (superblock := unpack_superblock(page)) is not None]
    return max(whole, key=lambda superblock: superblock.generation, default=None)


@contextmanager
def closed_on_error(file: LockedFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def claim(directory: Path, wanted: Superblock, calls: DiskCalls) -> tuple[LockedFile, Superblock]:
    """A file of `wanted.stamp` and as many slots, and what its superblock says now: that of a file that was found has
    its own generation. Raises SettingsError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = _find(directory, wanted, calls)
        if found is not None:
            return found
        return _make(directory, wanted, calls), wanted
    except OSError as error:
        size_gib = wanted.file_bytes / 2**30
        raise SettingsError(
            f"ssd_dir {directory} cannot hold this worker's file of {size_gib:.2f} GiB: {error.strerror}. "
            "Free some space, lower ssd_bytes, or name another directory."
        ) from error


def _find(directory: Path, wanted: Superblock, calls: DiskCalls) -> tuple[LockedFile, Superblock] | None:
    for file in _unlocked(directory, lambda superblock: superblock is None or superblock.stamp == wanted.stamp):
        with closed_on_error(file):
            superblock = file.superblock
            if superblock is not None:
                return file, _resize(file, superblock, wanted.slots, calls)
            file.remove("it was never completed, or its superblocks are damaged")
        file.close()
    return None


def _resize(file: LockedFile, superblock: Superblock, slots: int, calls: DiskCalls) -> Superblock:
    """A crash in between leaves a file that is larger than its superblock says, which the next start puts right."""
    resized = replace(superblock, slots=slots)
    status = os.fstat(file.fd)
    missing_bytes = resized.file_bytes - min(status.st_size, status.st_blocks * 512)
    if missing_bytes > 0:
        _make_room(file.path.parent, missing_bytes, superblock)
        calls.allocate(file.fd, 0, resized.file_bytes)
    if resized != superblock:
        log.info("KV file %s: %d slots instead of %d", file.path.name, slots, superblock.slots)
        file.write_superblock(resized, calls)
    if status.st_size > resized.file_bytes:
        calls.truncate(file.fd, resized.file_bytes)
    return resized


def _make(directory: Path, wanted: Superblock, calls: DiskCalls) -> LockedFile:
    """The superblock comes last: a file that has one is complete."""
    _make_room(directory, wanted.file_bytes, wanted)
    file = _create(directory)
    with closed_on_error(file):
        try:
            calls.allocate(file.fd, 0, wanted.file_bytes)
            file.write_superblock(wanted, calls)
        except OSError:
            file.remove("it could not be made")
            raise
    return file


def _create(directory: Path) -> LockedFile:
    """An empty one, under the first free number."""
    for number in range(FILES_MAX):
        path = directory / f"kv-{number}.slots"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        if _could_lock(fd):
            return LockedFile(path, fd)
        os.close(fd)  # another worker that starts now thinks that its maker died, and removes it
    raise OSError(0, f"there are {FILES_MAX} KV files in it already")


def _make_room(directory: Path, size_bytes: int, keep: Superblock) -> None:
    """Removes files of other stamps while the disk has too little room; whether that is enough shows when it is taken.
    Raises OSError."""

    def must_go(superblock: Superblock | None) -> bool:
        return superblock is not None and superblock.stamp != keep.stamp and not _has_room(directory, size_bytes)

    for file in _unlocked(directory, must_go, oldest_first=True):
        with closing(file):
            file.remove("it holds KV of another model or layout, and its room is needed")


def _has_room(directory: Path, size_bytes: int) -> bool:
    disk = os.statvfs(directory)
    return (disk.f_bavail - FREE_SHARE * disk.f_blocks) * disk.f_frsize >= size_bytes


def _unlocked(
    directory: Path, is_wanted: Callable[[Superblock | None], bool], *, oldest_first: bool = False
) -> Iterator[LockedFile]:
    """Those of the directory's files that no worker has, each locked and the caller's to close. Only what is wanted is
    locked: a worker that starts at this moment would take a file that is merely looked at for another's."""
    paths = [path for path in directory.glob("kv-*.slots") if path.is_file()]
    for path in sorted(paths, key=_used_s if oldest_first else _number):
        try:
            fd = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # gone, or not for us
            continue
        file = _locked_if(path, fd, is_wanted)
        if file is not None:
            yield file


def _locked_if(path: Path, fd: int, is_wanted: Callable[[Superblock | None], bool]) -> LockedFile | None:
    """None, and closed, if it is not. Looked at once more when it is locked: its maker may just have completed it."""
    try:
        if is_wanted(superblock_of(fd)) and _could_lock(fd) and is_wanted(superblock_of(fd)):
            return LockedFile(path, fd)
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _could_lock(fd: int) -> bool:
    """Not where another has the lock, or the file was removed before it could be got."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(fd).st_nlink > 0


def _number(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def _used_s(path: Path) -> float:
    """When it was last written; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
