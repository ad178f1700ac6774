"""How many sequences may be in flight: past the bound callers are told to come back."""

import asyncio

from baton.errors import InvalidRequest, Overloaded, Unavailable

RETRY_AFTER_S = 1.0


class Admission:
    def __init__(self, sequences_max: int) -> None:
        self.sequences_max = sequences_max
        self.in_flight = 0
        self.is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self) -> "Place":
        """One sequence's place. Raises Overloaded when all are taken, Unavailable when closed."""
        if self.is_closed:
            raise Unavailable("This router is shutting down; send the request to another.")
        place = Place(self)
        place.widen(1)
        return place

    def close(self) -> None:
        """Admits nobody any more."""
        self.is_closed = True

    async def idle(self) -> None:
        await self._idle.wait()

    def _take(self, sequences: int) -> None:
        if self.in_flight + sequences > self.sequences_max:
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

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._sequences = 0

    def widen(self, sequences: int) -> None:
        """The request turns out to hold this many. Raises Overloaded while there are too few places left,
        InvalidRequest if there will never be enough."""
        if sequences > self._admission.sequences_max:
            most = self._admission.sequences_max
            raise InvalidRequest(f"The request holds {sequences} sequences, but this server takes {most} at once.")
        self._admission._take(sequences - self._sequences)
        self._sequences = sequences

    def close(self) -> None:
        """Idempotent."""
        self._admission._give_back(self._sequences)
        self._sequences = 0

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
