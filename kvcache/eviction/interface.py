"""What a tier asks when it must choose: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockHash

Floats = NDArray[np.float64]
Counts = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Blocks of which some must go, each an entry of every array."""

    age_s: Floats
    """Since a request last used it or had it stored, whatever tier it lay in."""
    uses: Counts
    """Reuses so far, as `KeepPolicy.seen` last said of it; 0 where that is not known."""
    depth: Counts
    """Place in the prompt, in blocks."""
    saved_s: Floats
    """What not computing it again saves, less what bringing it up takes."""
    copies: Counts
    """On other workers."""
    size_bytes: int
    """Of each."""
    fetch_s: float = 0.0
    """What bringing one up takes longer from another worker than from here."""


class KeepPolicy(Protocol):
    """Learns how likely blocks are to be used again, and when. Deterministic: no clock, no chance of its own."""

    def seen(self, names: Sequence[BlockHash], depths: Counts, now_s: float) -> Counts:
        """Requests use these blocks, all different, at these depths of their prompts: found in whatever tier, or
        computed and stored now. To be told once of each block of each request, of the first block before the last;
        `now_s` never goes back.

        How often each was used before, even if it was dropped since: a bounded memory of names, far longer than the
        tiers', tells a block that comes again and again from one that is seen once. To be kept as `uses`.
        """

    def values(self, blocks: Candidates) -> Floats:
        """What keeping each is worth: seconds saved per byte and second of keeping. The lowest goes first.

        Comparable between any blocks at any time: a newcomer (`age_s` 0) that is worth less than what it would
        displace need not be taken in.
        """
