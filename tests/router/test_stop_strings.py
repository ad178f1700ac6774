import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from router.text.stop_strings import STOP_CHARACTERS_MAX, STOPS_MAX, StopStrings, check_stops


def scan(pieces: list[str], stops: list[str], *, include_stop: bool = False) -> tuple[str, str | None]:
    scanner = StopStrings(stops, include_stop=include_stop)
    text = ""
    for piece in pieces:
        scanned = scanner.feed(piece)
        text += scanned.text
        if scanned.matched is not None:
            return text, scanned.matched
    return text + scanner.flush(), None


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By looking at every prefix of the text: the first that ends with a stop string, the longest of those."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_cut_is_where_a_search_of_the_whole_text_finds_it(pieces: list[str], stops: list[str]) -> None:
    assert scan(pieces, stops) == expected("".join(pieces), stops)


def test_a_stop_string_is_found_across_pieces() -> None:
    assert scan(["one t", "w", "o three"], ["two"]) == ("one ", "two")


def test_included_where_asked_for() -> None:
    assert scan(["one t", "wo three"], ["two"], include_stop=True) == ("one two", "two")


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    scanner = StopStrings(["END"])
    assert scanner.feed("abcE").text == "abc"
    assert scanner.feed("N").text == ""
    assert scanner.feed("x").text == "ENx"
    assert scanner.feed("EEN").text == "E"
    assert scanner.flush() == "EN"


@pytest.mark.parametrize("stops", [["x"] * (STOPS_MAX + 1), ["ok", ""], ["x" * (STOP_CHARACTERS_MAX + 1)]])
def test_unreasonable_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_stops(stops)
    assert caught.value.param == "stop"
