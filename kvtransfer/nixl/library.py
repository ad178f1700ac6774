"""The nixl package, loaded once and kept quiet."""

import logging
from functools import cache
from types import ModuleType
from typing import Any

TRANSPORT = "nixl"


@cache
def library() -> ModuleType:
    """The API module. It takes a fraction of a second to load, so a transport that nobody uses never does.

    Loaded, it prints its notes to the standard output and tells all of Python's logging to swallow errors; both are
    undone here. What its C++ part has to say, which is warnings and errors, goes to the standard error as ever.
    """
    raise_exceptions = logging.raiseExceptions
    from nixl_cu12 import _api

    logging.raiseExceptions = raise_exceptions
    chatter = logging.getLogger("nixl")
    chatter.handlers.clear()
    chatter.propagate = True
    chatter.setLevel(logging.WARNING)
    return _api


@cache
def failures() -> tuple[type[Exception], ...]:
    """What its calls raise: exceptions that have nothing but Exception in common, and RuntimeError without plugins."""
    bindings: Any = library().nixlBind
    kinds = (kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, RuntimeError)
