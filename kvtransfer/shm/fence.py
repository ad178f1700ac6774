"""Who is in the middle of a copy: a writer holds the kernel's lock on its ticket for as long.

The locks are open-file-description locks (`fcntl`, F_OFD_SETLK) on the memfd of the ticket table, one byte's worth for
each ticket number; the bytes need not exist, and no number is ever used again. A writer locks, *then* looks whether the
ticket is open, copies, and unlocks; the receiver withdraws the ticket, *then* tries to get the lock for itself. The
kernel takes one of them first, and orders memory as it does: a writer that comes after the receiver sees the ticket
closed, and a receiver that comes after the writer sees its last byte. Plain flags in shared memory would need barriers
between a store and a load (Dekker's algorithm), which Python cannot ask for.

The lock goes with the writer's open file. So one that is stopped keeps it, and one that is killed loses it, which the
kernel sees to only after the last of its threads has stopped.
"""

import fcntl
import struct

from baton.errors import TransferError

_FLOCK = struct.Struct("@hhqqi0q")
"""struct flock: type, whence, start, length, and a process id that must be 0."""


def enter(table_fd: int, ticket: int) -> None:
    """The writer's. Raises TransferError where the receiver is about to settle the ticket, which is closed then."""
    try:
        _lock(table_fd, fcntl.F_RDLCK, ticket)
    except BlockingIOError:
        raise TransferError("The receiver has closed the ticket.") from None
    except OSError as error:
        raise TransferError(f"The ticket could not be locked: {error.strerror}.") from None


def leave(table_fd: int, ticket: int) -> None:
    _lock(table_fd, fcntl.F_UNLCK, ticket)


def is_clear(table_fd: int, ticket: int) -> bool:
    """The receiver's, after it has withdrawn the ticket: no copy is under way, and none will be. What the copies wrote
    can be read."""
    try:
        _lock(table_fd, fcntl.F_WRLCK, ticket)
    except OSError:  # a writer has it; or the kernel is out of locks, which looks alike until it has one
        return False
    _lock(table_fd, fcntl.F_UNLCK, ticket)
    return True


def _lock(table_fd: int, kind: int, ticket: int) -> None:
    fcntl.fcntl(table_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, ticket, 1, 0))
