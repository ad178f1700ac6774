"""What this router sent to workers a moment ago: it counts before any event tells of it, and not for ever."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from router.index.block_table import Keys
from router.index.member import Member

EXPECTED_BLOCKS_MAX = 1_000_000
"""Past it the oldest are forgotten. They take 40 bytes a block."""


@dataclass(frozen=True, slots=True)
class Expectation:
    since_s: float
    due_s: float
    """When it is forgotten, unless its worker is stale then."""
    members: tuple[Member, ...]
    keys: Keys


class Expectations:
    """Oldest first. Those of a stale worker are not due: they are all that is known of what it got."""

    def __init__(self, expect_s: float) -> None:
        self._expect_s = expect_s
        self._waiting: deque[Expectation] = deque()
        self.blocks = 0

    def add(self, now_s: float, members: Iterable[Member], keys: Keys) -> None:
        self._append(Expectation(now_s, now_s + self._expect_s, tuple(members), keys))

    def pop_due(self, now_s: float) -> Expectation | None:
        """One that is to be forgotten; None when there is none, or none in sight."""
        is_over = self.blocks > EXPECTED_BLOCKS_MAX
        if not self._waiting or (self._waiting[0].due_s > now_s and not is_over):
            return None
        oldest = self._waiting.popleft()
        self.blocks -= len(oldest.keys.keys)
        stale = tuple(member for member in oldest.members if member.is_here and member.doubts)
        if stale and not is_over:
            self._append(Expectation(oldest.since_s, now_s + self._expect_s, stale, oldest.keys))
            return Expectation(oldest.since_s, now_s, tuple(set(oldest.members) - set(stale)), oldest.keys)
        return oldest

    def of(self, member: Member, now_s: float) -> Iterator[Keys]:
        """What was sent to it within the last while; older ones are not expected once its snapshot is there."""
        for each in self._waiting:
            if member in each.members and each.since_s + self._expect_s > now_s:
                yield each.keys

    def _append(self, expectation: Expectation) -> None:
        self._waiting.append(expectation)
        self.blocks += len(expectation.keys.keys)
