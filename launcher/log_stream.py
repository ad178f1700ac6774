"""A text stream whose lines become log entries."""

import io
import logging


class LogStream(io.TextIOBase):
    """Stands in for stdout while a library prints there what is no output of ours."""

    def __init__(self, log: logging.Logger, level: int = logging.DEBUG) -> None:
        self._log, self._level = log, level

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._log.log(self._level, "%s", line.strip())
        return len(text)
