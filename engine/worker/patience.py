"""How long a request waits for a fetch, so that a bad one costs it little. Pure.

While nothing has landed that is LATE_SHARE of the time that computing the blocks takes, with RELEASE_SHARE for taking
the fetch back; each block that has landed adds the time that it saves. Waiting and computing the rest therefore take a
request at most 1 + LATE_SHARE times as long as computing alone, whenever it gives up, and a fetch that keeps pace with
computing is not given up. Nobody waits longer than computing takes, whatever has landed: not even for a peer that falls
silent after having sent a part, of which nothing can be used while it may still write.

It is the rule of who rents skis until the rent is half their price: how long a fetch will take is not known, and a
deadline alone is either too early for one that is nearly there, or costs nearly all of the computing for one that
brings nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

LATE_SHARE = 0.5
"""Of the time that computing takes, that a fetch may cost a request which gets nothing by it."""
RELEASE_SHARE = 0.1
"""Of the same, and within it: for the answer to taking a fetch back, by which what has landed counts."""
FETCH_SHARE = 1.0 - RELEASE_SHARE
"""The most that a fetch itself may take."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Of one request, with one fetch."""

    compute_s: float
    """For the blocks that it waits for."""
    rest_share: Callable[[int], float]
    """Of that, what computing the others takes when so many have landed."""
    waited_s: float = 0.0
    """For fetches before this one."""

    @property
    def left_s(self) -> float:
        """In which all of it has to be done."""
        return self.compute_s - self.waited_s

    @property
    def release_s(self) -> float:
        """For taking it back."""
        return RELEASE_SHARE * self.compute_s

    def fetch_s(self, landed: int) -> float:
        """After which it gives up; negative if it should not even begin."""
        saved = 1.0 - self.rest_share(landed)
        share = min(LATE_SHARE - RELEASE_SHARE + saved, FETCH_SHARE)
        return share * self.compute_s - self.waited_s
