"""A device in virtual time, such as the link to host memory or a disk: one thing at a time, restores first."""

from collections import deque
from collections.abc import Callable
from itertools import chain

from simulator.virtual_time import VirtualTime


class Haul:
    """Bytes that a device moves in equal parts, one after the other."""

    def __init__(
        self, seconds: float, on_end: Callable[[], None], parts: int = 1, on_part: Callable[[], None] | None = None
    ) -> None:
        """`on_part` is called after each part but the last one."""
        self.landed, self.parts = 0, parts
        self.on_end, self.on_part = on_end, on_part
        self._seconds, self._spent_s = seconds, 0.0
        self.began_s: float | None = None
        self._resumed_s: float | None = None
        """None: it does not run."""

    @property
    def next_s(self) -> float:
        """When the next part has landed, if nothing comes between. Of one that runs."""
        return self._part_s(self.landed + 1)

    @property
    def end_s(self) -> float:
        return self._part_s(self.parts)

    def _part_s(self, part: int) -> float:
        assert self._resumed_s is not None
        return self._resumed_s - self._spent_s + self._seconds * part / self.parts

    def resume(self, now_s: float) -> None:
        self._resumed_s = now_s
        if self.began_s is None:
            self.began_s = now_s

    def pause(self, now_s: float) -> None:
        assert self._resumed_s is not None
        self._spent_s += now_s - self._resumed_s
        self._resumed_s = None


class Device:
    """What goes down stops while something comes up, and goes on where it was; of a kind, what came first goes first.

    The real I/O threads do the same by pieces of a millisecond.
    """

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._up: deque[Haul] = deque()
        self._down: deque[Haul] = deque()
        self._running: Haul | None = None
        self._turn_number = 0
        """Of the planned end of a part; one that is planned anew goes under another."""

    def bring_up(self, haul: Haul) -> None:
        self._up.append(haul)
        self._go_on()

    def take_down(self, haul: Haul) -> None:
        self._down.append(haul)
        self._go_on()

    def drop(self, haul: Haul) -> None:
        """What comes up, and nobody wants any more."""
        self._up.remove(haul)
        self._go_on()

    def _go_on(self) -> None:
        first = next(chain(self._up, self._down), None)
        if first is self._running:
            return
        if self._running is not None:
            self._running.pause(self._time.now_s)
        self._running = first
        self._turn_number += 1
        if first is not None:
            first.resume(self._time.now_s)
            self._plan(first)

    def _plan(self, haul: Haul) -> None:
        number = self._turn_number
        self._time.at(max(haul.next_s, self._time.now_s), lambda: self._land(number))

    def _land(self, number: int) -> None:
        haul = self._running
        if number != self._turn_number or haul is None:
            return
        haul.landed += 1
        if haul.landed < haul.parts:
            self._plan(haul)
            if haul.on_part is not None:
                haul.on_part()
            return
        (self._up or self._down).popleft()
        self._go_on()
        haul.on_end()
