"""How many sequences may be held at a time: past the bound callers are told to come back."""

import asyncio
from collections.abc import Callable

from baton.errors import InvalidRequest, Overloaded

RETRY_AFTER_S = 1.0


class Places:
    def __init__(self, sequences_max: int, tell_full: Callable[[], None]) -> None:
        """`tell_full` hears of each that is turned away."""
        self.sequences_max, self._tell_full = sequences_max, tell_full
        self.in_flight = 0
        """Sequences that hold a place."""
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> "Place":
        """One sequence's place. Raises Overloaded when all are taken."""
        place = Place(self)
        place.widen(1)
        return place

    async def idle(self) -> None:
        """Returns when nobody holds a place."""
        await self._idle.wait()

    def _take(self, sequences: int) -> None:
        if self.in_flight + sequences > self.sequences_max:
            self._tell_full()
            raise Overloaded(
                f"All {self.sequences_max} places for requests in flight are taken; try again in a moment.",
                RETRY_AFTER_S,
            )
        self.in_flight += sequences
        self._idle.clear()

    def _give_back(self, sequences: int) -> None:
        self.in_flight -= sequences
        if not self.in_flight:
            self._idle.set()


class Place:
    """Held from a request's arrival until its answer is out; `close` gives it back, once."""

    def __init__(self, places: "Places") -> None:
        self._places = places
        self._sequences = 0

    def widen(self, sequences: int) -> None:
        """The request turns out to hold this many. Raises Overloaded while there are too few places left,
        InvalidRequest if there will never be enough."""
        if sequences > self._places.sequences_max:
            most = self._places.sequences_max
            raise InvalidRequest(f"The request holds {sequences} sequences, but this server takes {most} at once.")
        self._places._take(sequences - self._sequences)
        self._sequences = sequences

    def close(self) -> None:
        """Idempotent."""
        self._places._give_back(self._sequences)
        self._sequences = 0

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
