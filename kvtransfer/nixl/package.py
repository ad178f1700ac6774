"""The nixl package, loaded once and kept quiet."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TRANSPORT = "nixl"
PACKAGES = ("nixl_cu13", "nixl_cu12")
"""One for each CUDA version; without a GPU either will do."""


def installed() -> str | None:
    """The package to use; None: there is none."""
    return next((name for name in PACKAGES if find_spec(name)), None)


@cache
def library() -> ModuleType:
    """The API module. It takes a fraction of a second to load, so a transport that nobody uses never does.

    Loaded, it prints its notes to the standard output and tells all of Python's logging to swallow errors; both are
    undone here. What its C++ part has to say, which is warnings and errors, goes to the standard error as ever.
    """
    raise_exceptions = logging.raiseExceptions
    name = installed()
    assert name is not None, "the registry leaves the transport out where the package is missing"
    _api = import_module(f"{name}._api")
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
