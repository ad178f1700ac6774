"""A job of the I/O threads, as the engine's thread sees it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """Ends by itself, once, when all its pieces have ended; nothing touches its rows and slots after that.

    One failed piece fails it, and the others then need not run. The thread that ends it calls `settle` just before
    and `wake` right after.
    """

    def __init__(self, result: T, pieces: int, settle: Callable[[], None], wake: Callable[[], None]) -> None:
        """The pieces fill `result` in. A job of none has ended; nobody is told."""
        self._result = result
        self._left = pieces
        self._settle = settle
        self._wake = wake
        self._lock = threading.Lock()
        self._error: OSError | None = None
        self._ended = threading.Event()
        if not pieces:
            self._ended.set()

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    @property
    def error(self) -> OSError | None:
        """The first; what the pieces before it did is done."""
        return self._error

    @property
    def result(self) -> T:
        """Once it is done, and right where it has not failed."""
        assert self.is_done
        return self._result

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended."""
        return self._ended.wait(timeout_s)

    def piece_ended(self, error: OSError | None) -> None:
        """For the I/O threads."""
        with self._lock:
            if self.is_done:
                return
            self._error = self._error or error
            self._left -= 1
            has_ended = self._left == 0
        if has_ended:
            self._settle()
            self._ended.set()
            self._wake()
