"""How urgent a request is: who passes whom in the router's queue."""

from typing import Literal

RequestClass = Literal["interactive", "standard", "batch"]
CLASSES: tuple[RequestClass, ...] = ("interactive", "standard", "batch")
"""The most urgent first."""
