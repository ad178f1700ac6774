"""Runs of adjacent places in a list of them: what one copy or one system call can take together."""

from collections.abc import Iterator, Sequence

import numpy as np


def runs_of(*places: Sequence[int]) -> Iterator[slice]:
    """Cuts lists of equal length where one of them goes on with anything but the next number: slices of positions,
    in order, that cover them all."""
    arrays = [np.asarray(some, np.int64) for some in places]
    count = len(arrays[0])
    if not count:
        return
    is_cut = np.zeros(max(0, count - 1), bool)
    for array in arrays:
        is_cut |= np.diff(array) != 1
    begin = 0
    for end in (np.flatnonzero(is_cut) + 1).tolist():
        yield slice(begin, end)
        begin = end
    yield slice(begin, count)
