"""How long a prefix of a prompt each worker of a fleet holds: many workers, few different lengths."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.intp]


class PrefixLength(Protocol):
    """Blocks of the longest contiguous prefix that one worker holds, by the tier they lie in."""

    @property
    def hbm(self) -> int: ...
    @property
    def ddr(self) -> int: ...
    @property
    def ssd(self) -> int: ...


class Prefixes(Mapping[int, PrefixLength]):
    """By column; without those that hold nothing.

    `numbers` has an entry for each column of the fleet: which of `lengths` it holds, or -1.
    """

    __slots__ = ("lengths", "numbers")

    def __init__(self, numbers: Numbers, lengths: Sequence[PrefixLength]) -> None:
        self.numbers, self.lengths = numbers, lengths

    @classmethod
    def of(cls, lengths: Mapping[int, PrefixLength], columns: int) -> "Prefixes":
        numbers = np.full(columns, -1)
        numbers[list(lengths)] = np.arange(len(lengths))
        return cls(numbers, tuple(lengths.values()))

    @property
    def has_lower_tiers(self) -> bool:
        return any(length.ddr or length.ssd for length in self.lengths)

    def __getitem__(self, column: int) -> PrefixLength:
        if (number := self.numbers.item(column)) < 0:
            raise KeyError(column)
        return self.lengths[number]

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self.numbers >= 0).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self.numbers >= 0))
