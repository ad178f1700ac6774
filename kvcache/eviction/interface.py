"""What a tier asks when it must choose: numbers in, numbers out."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Blocks of which some must go, each an entry of every array."""

    age_s: Floats
    """Since the last use, or since it was stored."""
    uses: NDArray[np.int32]
    """Reuses so far."""
    interval_s: Floats
    """Between the last two uses; infinite before the first reuse."""
    depth: NDArray[np.int32]
    """Place in the prompt, in blocks."""
    saved_s: Floats
    """What not computing it again saves, less what bringing it up takes."""
    size_bytes: int
    """Of each."""
    copies: NDArray[np.int32]
    """On other workers."""


class KeepPolicy(Protocol):
    """Learns from what it is told how likely blocks are to be reused. Deterministic: no clock, no chance of its own."""

    def hit(self, age_s: float, uses: int, depth: int) -> None:
        """A block that was used `uses` times before was used again after `age_s`."""

    def lost(self, age_s: float, uses: int, depth: int) -> None:
        """A block went, after so long without a use."""

    def values(self, blocks: Candidates) -> Floats:
        """What keeping each is worth: seconds saved per byte and second of keeping. The lowest goes first."""
