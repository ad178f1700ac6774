"""Reads waiting and under way: which is begun when."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.errors import TransferError
from kvtransfer.nixl.agent import Peer

IN_FLIGHT_BYTES_MAX = 64 * 2**20
"""Of one worker. A read larger than that goes alone."""
READ_BYTES_MAX = 16 * 2**20
"""Of one read: between two reads the thread looks who is still wanted, after a millisecond or so."""


class Unwanted(TransferError):
    """Nobody wanted a read any more when its turn came; nothing of it has landed."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Slices of a peer's region into as many of this one, by their places."""

    peer: Peer
    local: NDArray[np.int32]
    remote: NDArray[np.int32]
    size_bytes: int
    is_wanted: Callable[[], bool]
    """Asked right before it begins."""
    ended: "asyncio.Future[None]"
    """Set once none of its bytes can land any more: to the error, if they have not all landed."""


@dataclass(frozen=True, slots=True)
class Ended:
    read: Read
    error: TransferError | None = None


class Reader(Protocol):
    """What the pipeline needs of the agent."""

    def post(self, peer: Peer, local: NDArray[np.int32], remote: NDArray[np.int32]) -> Any: ...

    def is_done(self, handle: Any) -> bool: ...


class Pipeline:
    """First come, first begun, with a bound on the bytes under way."""

    def __init__(self, agent: Reader, bytes_max: int = IN_FLIGHT_BYTES_MAX) -> None:
        self._agent, self._bytes_max = agent, bytes_max
        self._waiting: deque[Read] = deque()
        self._under_way: list[tuple[Read, Any]] = []
        self._bytes = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._under_way)

    def add(self, read: Read) -> None:
        self._waiting.append(read)

    def advance(self) -> list[Ended]:
        """Looks at what is under way, and begins what there is room for; each call begins at least one of them
        that can, and returns before the next where the last is done already: an end is told at once."""
        ended = list(self._finished())
        while self._waiting and not ended and self._has_room(self._waiting[0]):
            ended += self._begin(self._waiting.popleft())
        return ended

    def give_up(self) -> list[Ended]:
        """All that have not ended: the agent is gone."""
        left = [*self._waiting, *(read for read, _ in self._under_way)]
        self._waiting.clear()
        self._under_way.clear()
        return [Ended(read, Unwanted("The receiver is closing.")) for read in left]

    def _has_room(self, read: Read) -> bool:
        return not self._under_way or self._bytes + read.size_bytes <= self._bytes_max

    def _begin(self, read: Read) -> Iterator[Ended]:
        if not read.is_wanted():
            yield Ended(read, Unwanted("The receiver has closed the ticket."))
            return
        try:
            handle = self._agent.post(read.peer, read.local, read.remote)
        except TransferError as error:
            yield Ended(read, error)
            return
        self._under_way.append((read, handle))
        self._bytes += read.size_bytes
        yield from self._finished()

    def _finished(self) -> Iterator[Ended]:
        still = []
        for read, handle in self._under_way:
            try:
                if not self._agent.is_done(handle):
                    still.append((read, handle))
                    continue
                outcome = Ended(read)
            except TransferError as error:
                outcome = Ended(read, error)
            self._bytes -= read.size_bytes
            yield outcome
        self._under_way = still
