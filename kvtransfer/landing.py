"""Which of a ticket's blocks lie here, and which were found right. Pure."""

from collections.abc import Sequence

from baton.errors import TransferError

RESENDS_MAX = 1
"""How often one block is asked for again before it is given up."""


class Landing:
    """Numbers are indices into the ticket's blocks. Raises TransferError where the sender says what cannot be, or a
    block does not get right."""

    def __init__(self, asked: int) -> None:
        self._asked = asked
        self.sent = 0
        """So many, the first ones, the sender sends."""
        self._digests: list[int] = []
        self._is_right: list[bool] = []
        self._resends: list[int] = []
        self._awaited: set[int] = set()

    def started(self, blocks: int) -> None:
        if self.sent or blocks > self._asked:
            raise TransferError("The sender has started twice, or with more blocks than it was asked for.")
        self.sent = blocks
        self._digests, self._is_right, self._resends = [0] * blocks, [False] * blocks, [0] * blocks
        self._awaited = set(range(blocks))

    def landed(self, first: int, digests: Sequence[int]) -> range:
        """The blocks that are to be verified now."""
        told = range(first, first + len(digests))
        if not self._awaited.issuperset(told):
            raise TransferError("The sender told of blocks that nobody waits for.")
        self._awaited.difference_update(told)
        self._digests[told.start : told.stop] = digests
        return told

    def verified(self, told: range, mismatches: Sequence[int]) -> list[int]:
        """`mismatches` are indices into `told`. The blocks to ask for again."""
        again = [told[index] for index in mismatches]
        for block in told:
            self._is_right[block] = True
        for block in again:
            self._is_right[block] = False
            self._resends[block] += 1
            if self._resends[block] > RESENDS_MAX:
                raise TransferError("A KV block did not match its digest again after it was sent again.")
        self._awaited.update(again)
        return again

    @property
    def was_told_all(self) -> bool:
        """Each block that the sender sends, at least once."""
        return all(self._resends[block] for block in self._awaited)

    @property
    def is_right(self) -> bool:
        """All that the sender sends, which may be nothing, has landed and matches, as far as the policy asks."""
        return all(self._is_right)

    @property
    def leading(self) -> int:
        """So many blocks from the first on are right."""
        return self._is_right.index(False) if False in self._is_right else self.sent

    @property
    def digests(self) -> tuple[int, ...]:
        """Of these."""
        return tuple(self._digests[: self.leading])
