"""The threads that copy between the tiers, and who goes first."""

import errno
import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from itertools import count

log = logging.getLogger(__name__)

THREADS = 2
GIVE_WAY_S = 0.01


class Urgency(IntEnum):
    """What goes first. Among equals: what came first, so a slot is written and erased in the order asked for."""

    RESTORE = 0
    OFFLOAD = 1
    DISK_WRITE = 2


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A part of some job. `run` is given what to call when it is done with the disk and has more to do."""

    urgency: Urgency
    turn: int
    """Of its job."""
    number: int
    """In its job."""
    run: Callable[[Callable[[], None]], None] = field(compare=False)
    ended: Callable[[OSError | None], None] = field(compare=False)
    """Called when it was run, with what it raised, or instead of running it; after a `close` that did not wait for it,
    again."""
    needs_disk: bool = field(compare=False, default=False)


class IoThreads:
    """Two threads, of which one at most is at the disk.

    So one copies what was read while the other reads on, and copies between HBM and DDR get on whatever the disk
    does. More would not help: one core's copies already take most of the memory's bandwidth, and the disk reads
    as fast by one large call after the other. One at most copies down, so that a core is left to the engine and a
    thread to a restore. They are daemons: a disk that hangs does not keep the process from ending. What may wait is
    for the callers to bound.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._memory: list[Piece] = []
        self._disk: list[Piece] = []
        self._at_disk: Piece | None = None
        self._running: set[Piece] = set()
        self._is_closing = False
        self._turns = count()
        self._threads = [
            threading.Thread(target=self._work, name=f"kv-io-{index}", daemon=True) for index in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def next_turn(self) -> int:
        return next(self._turns)

    def submit(self, pieces: Iterable[Piece]) -> None:
        """From any thread. After `close` they fail at once."""
        pieces = list(pieces)
        with self._changed:
            is_closing = self._is_closing
            if not is_closing:
                for piece in pieces:
                    heapq.heappush(self._disk if piece.needs_disk else self._memory, piece)
                self._changed.notify_all()
        if is_closing:
            fail_all(pieces)

    def discard(self, turn: int) -> None:
        """Forgets the pieces of a job that wait; nobody is told."""
        with self._changed:
            for queue in (self._memory, self._disk):
                queue[:] = [piece for piece in queue if piece.turn != turn]
                heapq.heapify(queue)

    def give_way(self) -> bool:
        """For a long reader of the disk of another thread, between its calls: waits a little for those who wait for
        the disk. Whether it may go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or not (self._disk or self._at_disk), GIVE_WAY_S)
            return not self._is_closing

    def close(self, timeout_s: float) -> bool:
        """Fails what waits, and what a thread is still at after so long, which may then still read or write its rows
        and slots. Whether both threads have ended."""
        with self._changed:
            self._is_closing = True
            waiting = sorted(self._memory + self._disk)
            self._memory.clear()
            self._disk.clear()
            self._changed.notify_all()
        fail_all(waiting)
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._changed:
            stuck = sorted(self._running)
            self._running.clear()
        fail_all(stuck)
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while piece := self._take():
            error = failure_of(partial(piece.run, partial(self._leave_disk, piece)))
            with self._changed:
                self._running.discard(piece)
                self._changed.notify_all()  # somebody may have waited for it to end
            self._leave_disk(piece)
            piece.ended(error)

    def _take(self) -> Piece | None:
        """The most urgent that can run; None: the end."""
        with self._changed:
            while not self._is_closing:
                if queue := self._first_queue():
                    piece = heapq.heappop(queue)
                    self._running.add(piece)
                    if piece.needs_disk:
                        self._at_disk = piece
                    return piece
                self._changed.wait()
            return None

    def _first_queue(self) -> list[Piece] | None:
        queues = [self._memory if self._may_copy else [], self._disk if self._at_disk is None else []]
        return min(filter(None, queues), key=lambda queue: queue[0], default=None)

    @property
    def _may_copy(self) -> bool:
        """Not if only copies down wait, and one is being made."""
        is_copying_down = any(piece.urgency is Urgency.OFFLOAD for piece in self._running)
        return not (is_copying_down and self._memory and self._memory[0].urgency is Urgency.OFFLOAD)

    def _leave_disk(self, piece: Piece) -> None:
        with self._changed:
            if self._at_disk is piece:
                self._at_disk = None
                self._changed.notify_all()


def failure_of(work: Callable[[], None]) -> OSError | None:
    """Does it. A bug of ours, or of a driver, fails the job that it happened in and is logged; the thread goes on."""
    try:
        work()
    except OSError as error:
        return error
    except Exception as error:
        log.exception("An I/O thread of the cache tiers met what it did not expect")
        return OSError(f"unexpected {type(error).__name__}")
    return None


def fail_all(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        piece.ended(closed())


def closed() -> OSError:
    return OSError(errno.ECANCELED, "the tiers were closed")
