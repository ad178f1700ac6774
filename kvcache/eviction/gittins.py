"""Gittins' index of a cached block.

A cache slot pays one when its block is used, and costs time until then. Keeping a block for a while, unless it is used
sooner, yields hits at the rate of (chance of a use in that while) / (expected time until the use or the while's end).
The index is that rate for the while that is best for the block: what gives up its slot should be what has the lowest.
(Gittins, 1979, on scheduling; Beckmann et al., LHD, NSDI'18, rank by a similar density, with a fixed while.)
"""

import numpy as np

from kvcache.eviction.interface import Floats


def gittins_index(chances: Floats, widths_s: Floats) -> Floats:
    """[kind][bin], uses per second, of a block that has just entered the bin unused.

    `chances`: [kind][bin], of being used within the bin if not before; `widths_s`: of the bins.
    """
    kinds, bins = chances.shape
    index = np.empty_like(chances)
    hits = np.zeros((kinds, bins))
    """[kind][last bin of the while]: the chance of a use, from the current bin on."""
    waited_s = np.zeros((kinds, bins))
    for here in reversed(range(bins)):
        chance = chances[:, here, None]
        hits[:, here:] = chance + (1.0 - chance) * hits[:, here:]
        waited_s[:, here:] = widths_s[here] * (1.0 - chance / 2) + (1.0 - chance) * waited_s[:, here:]
        index[:, here] = (hits[:, here:] / waited_s[:, here:]).max(axis=1)
    return index
