"""Which of a ticket's blocks lie here, and which were found right. Pure."""

from collections.abc import Sequence

from baton.errors import Unavailable

RESENDS_MAX = 1
"""How often one block is asked for again before the attempt is given up."""


class Landing:
    """Numbers are indices into the ticket's blocks. Raises Unavailable where the prefill worker tells what cannot be,
    or a block does not get right."""

    def __init__(self, blocks: int) -> None:
        self.digests = [0] * blocks
        """As told with each block."""
        self._awaited = set(range(blocks))
        """To be told, for the first time or again."""
        self._unverified = blocks
        self._resends = [0] * blocks

    def landed(self, first: int, digests: Sequence[int]) -> range:
        """Returns the blocks that are to be verified."""
        told = range(first, first + len(digests))
        if not self._awaited.issuperset(told):
            raise Unavailable("The prefill worker told of blocks that were not asked for, or told of them already.")
        self._awaited.difference_update(told)
        self.digests[first : told.stop] = digests
        return told

    def verified(self, told: Sequence[int], mismatches: Sequence[int]) -> list[int]:
        """`mismatches` are indices into `told`. Returns the blocks to be asked for again."""
        self._unverified -= len(told) - len(mismatches)
        again = [told[index] for index in mismatches]
        for block in again:
            self._resends[block] += 1
            if self._resends[block] > RESENDS_MAX:
                raise Unavailable("A KV block did not match its digest again after it was sent again.")
        self._awaited.update(again)
        return again

    @property
    def was_told_all(self) -> bool:
        """Every block at least once."""
        return all(self._resends[block] for block in self._awaited)

    @property
    def is_right(self) -> bool:
        """Every block has landed and matches its digest, as far as the policy asks."""
        return not self._unverified
