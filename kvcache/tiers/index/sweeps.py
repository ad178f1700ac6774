"""What is done to many of the index' rows at once: O(rows), a fraction of a microsecond each."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from baton.ids import TenantTag
from baton.latency import TIERS
from kvcache.name_table import NO_ROW, Rows
from kvcache.tiers.index.marks import Mark
from kvcache.tiers.index.tier_index import TierIndex
from kvcache.tiers.interface import LowerTier

JUMPS_MAX: Final = 12
"""Prompts of up to 4096 blocks."""


def rows_of(index: TierIndex, tenant: TenantTag | None) -> Rows:
    """A tenant's blocks, or all. O(rows)."""
    end = index.table.rows_used + 1
    is_its = index.are_present(np.arange(end))
    if tenant is not None:
        is_its &= index.tenant[:end] == index.tenants.find(tenant)
    return np.flatnonzero(is_its)


def rows_below(index: TierIndex, tenant: TenantTag | None) -> Rows:
    """Of these, the ones below HBM."""
    rows = rows_of(index, tenant)
    return rows[(index.places["ddr"][rows] | index.places["ssd"][rows]) > 0]


def drop_below(index: TierIndex, rows: Rows, tiers: Sequence[LowerTier]) -> tuple[dict[LowerTier, list[int]], Rows]:
    """These rows leave these tiers, where some of them lie and what is written of them counts for nothing. Where
    they lay; and the rows that lie nowhere now, whose names are to be asked for before `remove_gone`."""
    places: dict[LowerTier, list[int]] = {}
    for tier in tiers:
        column = index.places[tier]
        there = rows[column[rows] > 0]
        places[tier] = (column[there] - 1).tolist()
        column[there] = 0
        index.counts[tier] -= len(there)
        if tier == "ddr":
            index.marks[there] &= ~np.uint8(Mark.MOVING)
    out = rows[(index.places["ddr"][rows] | index.places["ssd"][rows]) == 0]
    index.marks[out] &= ~np.uint8(Mark.DIGESTED | Mark.GOING | Mark.FROM_BELOW)
    in_hbm = index.places["hbm"][out] > 0
    copyable = (index.marks[out] & np.uint8(Mark.DECLINED | Mark.MOVING)) == 0
    index.unsaved.update(dict.fromkeys(out[in_hbm & copyable].tolist()))
    return places, out[~in_hbm]


def remove_gone(index: TierIndex, gone: Rows) -> None:
    """After `drop_below`: everything that hangs on it is made right."""
    for number, blocks in zip(
        *(each.tolist() for each in np.unique(index.tenant[gone], return_counts=True)), strict=True
    ):
        index.tenants.leave(number, blocks)
    index.parent[gone] = index.uses[gone] = index.copies[gone] = index.marks[gone] = 0
    end = index.table.rows_used + 1
    hbm, ddr, ssd = (index.places[tier][:end] > 0 for tier in TIERS)
    parent, is_upper = index.parent[:end], hbm | ddr
    index.children[:end] = np.bincount(parent[is_upper | ssd], minlength=end)
    index.upper_children[:end] = np.bincount(parent[is_upper], minlength=end)
    index.children[NO_ROW] = index.upper_children[NO_ROW] = 0
    index.table.keep(is_upper | ssd | (index.children[:end] > 0))
    index.leaves.refresh_all(end)


def age_orphans(index: TierIndex) -> None:
    """What lies below HBM and cannot be found, as a block before it lies nowhere: as if it had never been used. So
    it goes first, unless its head comes back and it is used. O(rows)."""
    end = index.table.rows_used + 1
    is_present = index.are_present(np.arange(end))
    parent = index.parent[:end]
    above = np.where(is_present & is_present[parent] & (parent > 0), parent, np.arange(end))
    for _ in range(JUMPS_MAX):  # each twice as far
        above = above[above]
    is_orphan = is_present & (index.depth[above] > 0) & (index.places["hbm"][:end] == 0)
    index.used_at[:end][is_orphan] = -np.inf
