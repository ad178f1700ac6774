"""Which blocks somebody was promised to find again, and how much of that each tenant has been promised.

A tenant's quota is of blocks under a promise on this worker, at what a block takes below HBM, wherever they lie at the
moment. Past it the new promise is not given, and those that stand are kept: a promise that was given is worth
something. What has been promised may be given to the next once its time is over. A tenant's promise of a block that
another's keeps already costs it nothing, and puts that one's time off.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf

from baton.ids import TenantTag
from kvcache.tiers.index.deadlines import Deadlines
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.tier_index import TierIndex
from kvcache.tiers.interface import Owner


class Promises:
    """By rows of the index; times are seconds since 1970, so that they hold in the next process."""

    def __init__(self, index: TierIndex, row_bytes: int) -> None:
        self._index, self._row_bytes = index, row_bytes
        self._deadlines = Deadlines()
        self._promised_to: dict[int, TenantTag] = {}
        self._blocks: Counter[TenantTag] = Counter()

    def __iter__(self) -> Iterator[int]:
        return iter(self._deadlines)

    def keep_until(self, row: int) -> float:
        """0: no promise; infinite: pinned."""
        return self._deadlines.until(row)

    def promised_bytes(self, tenant: TenantTag) -> int:
        return self._blocks[tenant] * self._row_bytes

    def give(self, rows: Sequence[int], owner: Owner, now: float) -> None:
        """To keep these, or the first of them that the quota allows: without its head a prefix is worth nothing."""
        until = inf if owner.pin else now + owner.ttl_s
        for row in rows:
            if row not in self._deadlines:
                if self.promised_bytes(owner.tenant) + self._row_bytes > owner.quota_bytes:
                    break
                self._charge(row, owner.tenant)
            self._deadlines.put_off(row, until)

    def found(self, row: int, tenant: TenantTag, until: float) -> None:
        """A promise of an earlier process: kept, whatever the quota is now, and counted towards it."""
        if row not in self._deadlines:
            self._charge(row, tenant)
        self._deadlines.put_off(row, until)

    def expire(self, now: float) -> None:
        for row in self._deadlines.pop_due(now):
            self._discharge(row)
            self._index.mark(row, Mark.PROMISED, False)

    def forget(self, row: int) -> None:
        """The block is gone."""
        if row in self._deadlines:
            self._deadlines.discard(row)
            self._discharge(row)

    def _charge(self, row: int, tenant: TenantTag) -> None:
        self._promised_to[row] = tenant
        self._blocks[tenant] += 1
        self._index.mark(row, Mark.PROMISED, True)

    def _discharge(self, row: int) -> None:
        tenant = self._promised_to.pop(row)
        self._blocks[tenant] -= 1
        if not self._blocks[tenant]:
            del self._blocks[tenant]

    def check_integrity(self) -> None:
        assert set(self._deadlines) == self._promised_to.keys()
        assert Counter(self._promised_to.values()) == self._blocks
        assert all(self._index.is_marked(row, Mark.PROMISED) for row in self._deadlines)
