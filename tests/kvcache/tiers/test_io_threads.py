"""Who goes first, and who may go at one time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

from io_rig import WAIT_S

from kvcache.tiers.io.threads import IoThreads, Piece, Urgency


class Order:
    """Pieces that tell when they begin, and wait to be let go."""

    def __init__(self, threads: IoThreads) -> None:
        self._threads = threads
        self._told = threading.Condition()
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def piece(self, name: str, urgency: Urgency, *, needs_disk: bool = False, waits: bool = False) -> Piece:
        if waits:
            self._gates[name] = threading.Event()

        def run(_: Callable[[], None]) -> None:
            self._tell(self.begun, name)
            if waits:
                assert self._gates[name].wait(WAIT_S)

        def ended(error: OSError | None) -> None:
            self._tell(self.ended, name if error is None else f"{name} failed")

        return Piece(urgency, self._threads.next_turn(), 0, run, ended, needs_disk)

    def submit(self, name: str, urgency: Urgency, *, needs_disk: bool = False, waits: bool = False) -> None:
        self._threads.submit([self.piece(name, urgency, needs_disk=needs_disk, waits=waits)])

    def let_go(self, name: str) -> None:
        self._gates[name].set()

    def wait_begun(self, *names: str) -> None:
        with self._told:
            assert self._told.wait_for(lambda: set(names) <= set(self.begun), WAIT_S), self.begun

    def wait_ended(self, *names: str) -> None:
        with self._told:
            assert self._told.wait_for(lambda: set(names) <= set(self.ended), WAIT_S), self.ended

    def _tell(self, told: list[str], name: str) -> None:
        with self._told:
            told.append(name)
            self._told.notify_all()


@contextmanager
def running() -> Iterator[Order]:
    threads = IoThreads()
    order = Order(threads)
    try:
        yield order
    finally:
        assert threads.close(WAIT_S)


def test_the_most_urgent_goes_first() -> None:
    with running() as order:
        order.submit("at the disk", Urgency.RESTORE, needs_disk=True, waits=True)
        order.submit("copying", Urgency.RESTORE, waits=True)
        order.wait_begun("at the disk", "copying")
        for name, urgency in Random(0).sample(
            [("write", Urgency.DISK_WRITE), ("down", Urgency.OFFLOAD), ("up", Urgency.RESTORE)], 3
        ):
            order.submit(name, urgency, needs_disk=urgency is Urgency.DISK_WRITE)
        order.let_go("copying")
        order.wait_ended("up", "down")
        order.let_go("at the disk")
        order.wait_ended("write")
        assert order.begun[2:] == ["up", "down", "write"]


def test_one_is_at_the_disk_and_one_copies_down() -> None:
    with running() as order:
        order.submit("down", Urgency.OFFLOAD, waits=True)
        order.wait_begun("down")
        order.submit("down too", Urgency.OFFLOAD)
        order.submit("up", Urgency.RESTORE)
        order.submit("write", Urgency.DISK_WRITE, needs_disk=True)
        order.wait_ended("up", "write")
        assert order.begun == ["down", "up", "write"]
        order.let_go("down")
        order.wait_ended("down", "down too")


def test_equals_go_as_they_came() -> None:
    with running() as order:
        order.submit("first", Urgency.DISK_WRITE, needs_disk=True, waits=True)
        names = [f"write {i}" for i in range(20)]
        for name in names:
            order.submit(name, Urgency.DISK_WRITE, needs_disk=True)
        order.let_go("first")
        order.wait_ended(*names)
        assert order.begun == ["first", *names]


def test_what_is_done_with_the_disk_may_leave_it_early() -> None:
    threads = IoThreads()
    order = Order(threads)
    has_left, may_end = threading.Event(), threading.Event()

    def run(leave_disk: Callable[[], None]) -> None:
        leave_disk()
        has_left.set()
        assert may_end.wait(WAIT_S)

    threads.submit([Piece(Urgency.RESTORE, threads.next_turn(), 0, run, lambda _: None, True)])
    assert has_left.wait(WAIT_S)
    order.submit("next", Urgency.RESTORE, needs_disk=True)
    order.wait_ended("next")
    may_end.set()
    assert threads.close(WAIT_S)


def test_what_is_discarded_never_runs_and_nobody_is_told() -> None:
    with running() as order:
        order.submit("first", Urgency.RESTORE, needs_disk=True, waits=True)
        order.wait_begun("first")
        piece = order.piece("discarded", Urgency.RESTORE, needs_disk=True)
        order._threads.submit([piece])
        order._threads.discard(piece.turn)
        order.submit("last", Urgency.RESTORE, needs_disk=True)
        order.let_go("first")
        order.wait_ended("first", "last")
        assert order.begun == order.ended == ["first", "last"]


def test_what_comes_after_the_end_fails() -> None:
    with running() as order:
        assert order._threads.close(WAIT_S)
        order.submit("late", Urgency.RESTORE)
        assert order.ended == ["late failed"] and not order.begun
