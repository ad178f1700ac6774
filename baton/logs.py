"""Logging: one line an event, on stderr, with the service's name and without passwords."""

import logging
import os
import re
import sys
import time

QUIET = ("asyncio", "filelock", "grpc", "httpcore", "httpx", "huggingface_hub", "ray", "transformers", "urllib3")
"""Libraries that are heard from `warning` on, whatever Baton's own level."""


class OneLine(logging.Formatter):
    """`2026-01-31T12:00:00.000Z warning decode-worker baton.cluster.lease: what happened`.

    Tracebacks follow on the same line, so that a line is always a whole event; passwords in URLs are
    blotted out wherever they come from.
    """

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(level)s {service} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.level = record.levelname.lower()
        line = super().format(record).replace("\n", " | ")
        return re.sub(r"://[^\s/@]*@", "://***@", line)


def set_up_logging(service: str, level: str) -> None:
    """Replaces what was set up before. `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(service))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in QUIET:
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.captureWarnings(True)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's core writes to stderr by itself
