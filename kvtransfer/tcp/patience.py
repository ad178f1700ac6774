"""How long the receiver waits for whom."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may keep the receiver waiting, in seconds."""

    hello_s: float = 5.0
    """From its start to its first proof of a ticket."""
    stall_s: float = 30.0
    """Between bytes of one frame."""
    idle_s: float = 60.0
    """Between frames while its ticket is closed; with an open one it may be silent as long as that is."""
    linger_s: float = 1.0
    """From a refusal until the connection is cut, so that the peer can read why."""


PATIENCE = Patience()
