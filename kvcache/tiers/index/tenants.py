"""Numbers tenants' tags, so that a block's row says in two bytes whose it is."""

from typing import Final

from baton.ids import TenantTag

NOBODY: Final = 0
TENANTS_MAX: Final = 2**16 - 1
"""With blocks on one worker at one time. Later ones have no number, and share NOBODY's."""
NO_TAG: Final = TenantTag(bytes(8))


class Tenants:
    """A tag has a number while it has blocks."""

    def __init__(self) -> None:
        self._number: dict[TenantTag, int] = {}
        self._tags: dict[int, TenantTag] = {NOBODY: NO_TAG}
        self._blocks: dict[int, int] = {}
        self._free: list[int] = []

    def enter(self, tag: TenantTag) -> int:
        """One block more."""
        number = self._number.get(tag, NOBODY)
        if number == NOBODY:
            if tag == NO_TAG or len(self._number) == TENANTS_MAX:
                return NOBODY
            number = self._free.pop() if self._free else len(self._number) + 1
            self._number[tag], self._tags[number], self._blocks[number] = number, tag, 0
        self._blocks[number] += 1
        return number

    def leave(self, number: int, blocks: int = 1) -> None:
        """So many blocks fewer."""
        if number == NOBODY:
            return
        self._blocks[number] -= blocks
        if not self._blocks[number]:
            del self._blocks[number], self._number[self._tags.pop(number)]
            self._free.append(number)

    def find(self, tag: TenantTag) -> int:
        """Its number; TENANTS_MAX + 1, which no block has, if it has no blocks."""
        return self._number.get(tag, TENANTS_MAX + 1 if tag != NO_TAG else NOBODY)

    def tag(self, number: int) -> TenantTag:
        return self._tags[number]
