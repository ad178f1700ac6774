"""Anonymous memory that another process of the same user on the same machine can map.

It is a memfd: it has no name in any file system, so nothing stays behind when its owner is killed, and
the one way to it is `/proc/PID/fd/FD`. The kernel follows that link for whoever may trace the process
(ptrace's access check: the same user, and no other namespace), and then asks the file's own mode, which
is 0600: strangers on the machine neither read nor write it. A process id and a descriptor number may
both be in use again by then, so a share also names the machine's boot, the PID namespace, the process's
start time and a random number that lies in the memory itself.
"""

import fcntl
import mmap
import os
import secrets
import struct
from dataclasses import dataclass, field
from typing import ClassVar, Self

from baton.errors import TransferError
from baton.process import ProcessIdentity

HEADER_BYTES = mmap.PAGESIZE
"""Before the payload, which thereby starts on a page: the random number, then nothing."""
_MEMFD_NAME = "baton-kv"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The size is final: no owner can make a writer in another process die of SIGBUS."""
_NONCE_BYTES = 16
_MAGIC = b"BSM1"
_GONE = "The other process no longer has the memory that it shared."


@dataclass(frozen=True, slots=True)
class Share:
    """Where a piece of shared memory is; `size` is the payload's, in bytes. Holds a secret: never logged."""

    boot_id: bytes
    pid_namespace: int
    process: ProcessIdentity
    fd: int
    size: int
    nonce: bytes = field(repr=False)

    FORMAT: ClassVar[struct.Struct] = struct.Struct("!4s16sQIQIQ16s")

    def pack(self) -> bytes:
        process = (self.process.pid, self.process.started_ticks)
        return self.FORMAT.pack(_MAGIC, self.boot_id, self.pid_namespace, *process, self.fd, self.size, self.nonce)

    @classmethod
    def unpack(cls, data: bytes) -> "Share":
        """Raises TransferError for anything that `pack` did not make."""
        if len(data) != cls.FORMAT.size or not data.startswith(_MAGIC):
            raise TransferError("This is not a description of shared memory that this version understands.")
        _, boot_id, pid_namespace, pid, started_ticks, fd, size, nonce = cls.FORMAT.unpack(data)
        return cls(boot_id, pid_namespace, ProcessIdentity(pid, started_ticks), fd, size, nonce)


class _Mapped:
    """A mapping and its payload view; see `close` for how long the memory lives."""

    def __init__(self, fd: int, size: int) -> None:
        self._mapping: mmap.mmap | None = mmap.mmap(fd, HEADER_BYTES + size)
        self._memory: memoryview | None = memoryview(self._mapping)[HEADER_BYTES:]

    @property
    def memory(self) -> memoryview:
        """The payload, writable. Views and tensors over it may outlive `close`."""
        assert self._memory is not None, "shared memory is closed"
        return self._memory

    @property
    def is_closed(self) -> bool:
        return self._memory is None

    def close(self) -> None:
        """Lets go; idempotent. The pages go back to the system when the last view or tensor over `memory`
        dies, at once if there is none. Nothing is unmapped by force: torch.frombuffer keeps the view that
        it was given alive, but exports no buffer, so its tensors would dangle."""
        self._memory = self._mapping = None


class SharedMemory(_Mapped):
    """This process's own; zero-filled, and not resident until touched."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create(_MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self._fd, 0o600)  # it is made as 0777
            os.ftruncate(self._fd, HEADER_BYTES + size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(self._fd, size)
        except (OSError, ValueError, OverflowError) as error:
            os.close(self._fd)
            raise TransferError(f"{size} bytes of shared memory could not be mapped: {error}.") from None
        assert self._mapping is not None
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._mapping[:_NONCE_BYTES] = nonce
        self._share = Share(_boot_id(), _pid_namespace(), ProcessIdentity.own(), self._fd, size, nonce)

    def share(self) -> Share:
        """Good for attaching until `close`; who has attached by then keeps the memory."""
        assert not self.is_closed, "shared memory is closed"
        return self._share

    def close(self) -> None:
        if not self.is_closed:
            super().close()
            os.close(self._fd)


class AttachedMemory(_Mapped):
    """Another process's, or this one's own by a second mapping. Owns `fd`, which is open for itself alone."""

    def __init__(self, owner: ProcessIdentity, fd: int, size: int) -> None:
        super().__init__(fd, size)
        self.owner, self.fd = owner, fd

    @classmethod
    def attach(cls, share: Share) -> Self:
        """Raises TransferError with the reason: other machine, other PID namespace, process or memory
        gone, not permitted."""
        _check_reachable(share)
        fd = _open_memfd(f"/proc/{share.process.pid}/fd/{share.fd}")
        try:
            _check_is(fd, share)
            attached = cls(share.process, fd, share.size)
        except TransferError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise TransferError(f"The memory of the other process could not be mapped: {error.strerror}.") from None
        if not attached._has(share.nonce):
            attached.close()
            raise TransferError(_GONE)
        return attached

    def close(self) -> None:
        if not self.is_closed:
            super().close()
            os.close(self.fd)

    def _has(self, nonce: bytes) -> bool:
        assert self._mapping is not None
        return secrets.compare_digest(self._mapping[:_NONCE_BYTES], nonce)


def _check_reachable(share: Share) -> None:
    if share.boot_id != _boot_id():
        raise TransferError("The other process runs on another machine.")
    if share.pid_namespace != _pid_namespace():
        raise TransferError("The other process runs in another PID namespace, such as another container's.")
    if not share.process.is_alive:
        raise TransferError("The other process is gone.")


def _open_memfd(path: str) -> int:
    try:
        if not os.readlink(path).startswith(f"/memfd:{_MEMFD_NAME}"):  # never open what else the number may mean now
            raise TransferError(_GONE)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise TransferError("This process is not permitted to map the memory of the other process.") from None
    except FileNotFoundError:
        raise TransferError(_GONE) from None
    except OSError as error:
        raise TransferError(f"The memory of the other process could not be opened: {error.strerror}.") from None


def _check_is(fd: int, share: Share) -> None:
    seals: int = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if os.fstat(fd).st_size != HEADER_BYTES + share.size or not seals & fcntl.F_SEAL_SHRINK:
        raise TransferError("The memory shared by the other process is not what it said.")


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
