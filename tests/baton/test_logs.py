import logging
import sys

from baton.logs import OneLine


def record(message: str, *arguments: object, failed: bool = False) -> logging.LogRecord:
    trouble = None
    if failed:
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            trouble = sys.exc_info()
    return logging.LogRecord("a.module", logging.WARNING, __file__, 1, message, arguments, trouble)


def test_a_line_says_when_what_and_who() -> None:
    line = OneLine("router").format(record("%d workers", 3))
    assert line.endswith("Z warning router a.module: 3 workers")


def test_an_event_with_a_traceback_stays_one_line() -> None:
    line = OneLine("router").format(record("it broke", failed=True))
    assert "\n" not in line
    assert "it broke | Traceback" in line and "first | second" in line


def test_passwords_in_urls_are_blotted_out() -> None:
    line = OneLine("router").format(record("at redis://me:secret@host:1/0 and redis://:hidden@host"))
    assert "secret" not in line and "hidden" not in line
    assert "redis://***@host:1/0" in line
