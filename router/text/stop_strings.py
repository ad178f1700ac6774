"""Finds stop strings in text that arrives in pieces, and holds back only what might begin one."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import InvalidRequest

STOPS_MAX = 16
STOP_CHARACTERS_MAX = 1024
"""Stop strings of one request, and characters in each."""


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidRequest if there are too many, or one is empty or too long."""
    if len(stops) > STOPS_MAX:
        raise InvalidRequest(f"stop may hold {STOPS_MAX} strings, not {len(stops)}.", "stop")
    if not all(stops):
        raise InvalidRequest("stop must not hold an empty string: it would stop everywhere.", "stop")
    longest = max(map(len, stops), default=0)
    if longest > STOP_CHARACTERS_MAX:
        raise InvalidRequest(f"A stop string may have {STOP_CHARACTERS_MAX} characters, not {longest}.", "stop")
    return tuple(stops)


@dataclass(frozen=True, slots=True)
class Scanned:
    text: str
    """What may be sent on."""
    matched: str | None = None
    """The stop string that ended the text; nothing may be fed after it."""


class StopStrings:
    """The text ends at the stop string that is complete first; of several complete at once, at the longest.

    How the text is cut into pieces makes no difference. Each character costs a constant time for each stop
    string (Knuth, Morris and Pratt), whatever strings are asked for.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops, self._include_stop = tuple(stops), include_stop
        self._borders = [_borders(stop) for stop in self._stops]
        self._matching = [0] * len(self._stops)
        """How many characters of each stop string the text so far ends with."""
        self._held = ""

    def feed(self, piece: str) -> Scanned:
        if not self._stops:
            return Scanned(piece)
        for position, character in enumerate(piece):
            if complete := self._advance(character):
                text = self._held + piece[: position + 1]
                self._held = ""
                return Scanned(text if self._include_stop else text[: -len(complete)], complete)
        text = self._held + piece
        released = len(text) - max(self._matching)
        self._held = text[released:]
        return Scanned(text[:released])

    def flush(self) -> str:
        """What was held back; the text has ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        complete = ""
        for index, stop in enumerate(self._stops):
            matching = self._matching[index]
            while matching and stop[matching] != character:
                matching = self._borders[index][matching - 1]
            self._matching[index] = matching = matching + (stop[matching] == character)
            if matching == len(stop) > len(complete):
                complete = stop
        return complete or None


def _borders(word: str) -> list[int]:
    """For each prefix of the word, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        length += word[index] == word[length]
        borders[index] = length
    return borders
