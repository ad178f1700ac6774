"""Which slots of a tier are free, and which must stay as they are although nobody needs what they hold any more."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from baton.ids import BlockId
from kvcache.free_runs import FreeRuns
from kvcache.tiers.interface import Slot


class Slots:
    """Every slot is free, taken, or given back but still held or to be erased."""

    def __init__(self, count: int, are_free: bool) -> None:
        """Not free: they are all taken until `free_others`."""
        self.total = count
        self._free = FreeRuns(count, are_free)
        self._holders: Counter[Slot] = Counter()
        self._left: dict[Slot, bool] = {}
        """Given back while held, and whether they are to be erased."""
        self._written = np.zeros(count, bool)
        """Hold, or may hold, something that could be read again."""
        self.to_erase: list[Slot] = []
        self._is_known = are_free
        """Which slots hold nothing."""

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[Slot]:
        """So many or as many as are free, adjacent and ascending as far as possible."""
        slots = [Slot(slot) for slot in self._free.take(min(count, self.free), None)]
        self._written[slots] = True
        return slots

    def give_back(self, slot: Slot, erase: bool = False) -> None:
        """Nobody needs what it holds: free once nobody holds it and, if so wished, it has been erased."""
        if slot in self._holders:
            self._left[slot] = erase
        elif erase:
            self.to_erase.append(slot)
        elif self._is_known:
            self._free.add(BlockId(slot))

    def give_back_all(self, slots: Sequence[Slot], erase: bool = False) -> None:
        """Many, without a step for each but for those that are held."""
        for slot in [slot for slot in slots if slot in self._holders] if self._holders else ():
            self.give_back(slot, erase)
        others = [slot for slot in slots if slot not in self._holders] if self._holders else list(slots)
        if erase:
            self.to_erase += others
        elif self._is_known:
            are_free = self._are_free()
            are_free[others] = True
            self._free = _runs_of(are_free)

    def hold(self, slots: Iterable[Slot]) -> None:
        """Somebody reads them: they are not given away meanwhile."""
        self._holders.update(slots)

    def let_go(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self._holders[slot] -= 1
            if not self._holders[slot]:
                del self._holders[slot]
                if slot in self._left:
                    self.give_back(slot, self._left.pop(slot))

    def erased(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._written[slot] = False
            self._free.add(BlockId(slot))

    def wipe_free(self) -> None:
        """What free slots still hold is to be erased as well."""
        are_free = self._are_free()
        self.to_erase += [Slot(slot) for slot in np.flatnonzero(are_free & self._written).tolist()]
        self._free = _runs_of(are_free & ~self._written)

    def _are_free(self) -> NDArray[np.bool_]:
        are_free = np.zeros(self.total, bool)
        for start, end in self._free:
            are_free[start:end] = True
        return are_free

    def free_others(self, taken: Iterable[Slot]) -> None:
        """Once it is known which slots hold something that is still needed."""
        are_free = np.ones(self.total, bool)
        are_free[[*taken, *self._left, *self.to_erase]] = False
        self._free = _runs_of(are_free)
        self._is_known = True

    def claim(self, slot: Slot) -> None:
        """Before `free_others`: this one holds something."""
        self._written[slot] = True

    def check_integrity(self, in_use: Sequence[Slot]) -> None:
        """Asserts that those in use and those that are not are all slots, each once."""
        free = [slot for start, end in self._free for slot in range(start, end)]
        every = [*free, *in_use, *self._left, *self.to_erase]
        assert len(every) == len(set(every)), "a slot is in two states"
        assert set(every) <= set(range(self.total))
        assert not self._is_known or len(every) == self.total, "a slot is lost"
        assert all(holders > 0 for holders in self._holders.values())


def _runs_of(are_free: NDArray[np.bool_]) -> FreeRuns:
    runs = FreeRuns(len(are_free), are_free=False)
    edges = np.flatnonzero(np.diff(are_free, prepend=False, append=False)).reshape(-1, 2)
    for start, end in edges.tolist():
        runs.add_run(start, end)
    return runs
