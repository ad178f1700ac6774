"""How a restore is cut into pieces, in which order, and which of its blocks are verified. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from baton.layout import KVLayout
from kvcache.tiers.interface import LowerTier, StorageFormat
from kvcache.tiers.io.interface import IoSizes, RestorePart, VerifyDdr

SAMPLE_EVERY = 16
"""Of the blocks from DDR, where a sample is verified."""


@dataclass(frozen=True, slots=True)
class RestorePiece:
    """These layers of the parts at these positions, all of one tier and stored alike."""

    tier: LowerTier
    storage: StorageFormat
    positions: tuple[int, ...]
    layers: range

    @property
    def is_staged(self) -> bool:
        """It is read or decoded into staging memory first."""
        return self.tier == "ssd" or self.storage != "none"


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore is going to do."""

    parts: Sequence[RestorePart]
    pieces: Sequence[RestorePiece]
    """In the order in which they should run."""
    layers: int
    row_bytes: int
    """Of one block in the pool."""
    stored_checks: frozenset[int]
    """Positions that are verified before they are decoded."""
    pool_checks: frozenset[int]
    """Positions that are verified where they landed, each piece when it has."""


def plan_restore(
    parts: Sequence[RestorePart], layout: KVLayout, sizes: IoSizes, staging_rows: int, verify: VerifyDdr, turn: int
) -> RestorePlan:
    """A `turn` of its own for each restore."""
    pieces = restore_pieces(parts, layout, sizes, staging_rows)
    checks = to_verify(parts, verify, turn)
    in_pool = frozenset(at for at in checks if parts[at].storage == "none")
    return RestorePlan(parts, pieces, layout.layers, layout.block_bytes, checks - in_pool, in_pool)


def restore_pieces(
    parts: Sequence[RestorePart], layout: KVLayout, sizes: IoSizes, staging_rows: int
) -> list[RestorePiece]:
    """Rows come by groups of layers, lowest first: the engine computes on the first ones while the next are copied.
    From the SSD that is so where a row is large; else it is read whole, header and all, so none of its layers lands
    before the others, and the same goes for rows that are decoded. No layer has landed before these have, and the disk
    is what is waited for, so what is staged comes first, in the order of its slots, because adjacent ones are read in
    one call.
    """
    staged = sorted(
        (at for at, part in enumerate(parts) if part.tier == "ssd" or part.storage != "none"),
        key=lambda at: (parts[at].tier == "ddr", parts[at].storage, parts[at].slot),
    )
    pieces = [
        RestorePiece(tier, storage, some, layers)
        for (tier, storage), alike in groupby(staged, lambda at: (parts[at].tier, parts[at].storage))
        for group in [list(alike)]
        for layers in (read_groups(layout, sizes) if storage == "none" and tier == "ssd" else [range(layout.layers)])
        for some in chunks(group, staging_rows)
    ]
    in_layers = [at for at, part in enumerate(parts) if part.tier == "ddr" and part.storage == "none"]
    return pieces + list(layer_pieces(in_layers, layout, sizes))


def read_groups(layout: KVLayout, sizes: IoSizes) -> list[range]:
    """The layers that one read of a row brings: about as many each."""
    groups = min(layout.layers, max(1, layout.block_bytes // sizes.read_bytes))
    bounds = [layout.layers * group // groups for group in range(groups + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


def layer_pieces(positions: Sequence[int], layout: KVLayout, sizes: IoSizes) -> Iterator[RestorePiece]:
    """From DDR, group by group, each cut into pieces."""
    if not positions:
        return
    layer_bytes = layout.block_bytes // layout.layers
    group = min(layout.layers, -(-sizes.group_bytes // (layer_bytes * len(positions))))
    for first in range(0, layout.layers, group):
        layers = range(first, min(first + group, layout.layers))
        for some in chunks(positions, max(1, sizes.piece_bytes // (layer_bytes * len(layers)))):
            yield RestorePiece("ddr", "none", some, layers)


def chunks(positions: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    for begin in range(0, len(positions), size):
        yield tuple(positions[begin : begin + size])


def to_verify(parts: Sequence[RestorePart], verify: VerifyDdr, turn: int) -> frozenset[int]:
    """The positions of those that are: what comes from the SSD, and from DDR all, none, or every SAMPLE_EVERYth, others
    in another turn."""
    every = {"always": 1, "sampled": SAMPLE_EVERY}.get(verify)
    in_ddr = [at for at, part in enumerate(parts) if part.tier == "ddr"]
    sample = in_ddr[turn % every :: every] if every else []
    return frozenset(sample) | {at for at, part in enumerate(parts) if part.tier == "ssd"}


class LayerCount:
    """How many of the lowest layers have landed, in all blocks."""

    def __init__(self, pieces: Iterable[RestorePiece], layers: int) -> None:
        self._layers = layers
        self._left = Counter[int]()
        """Blocks that are to land from a layer on, by that layer."""
        for piece in pieces:
            self._left[piece.layers.start] += len(piece.positions)

    def landed(self, layers: range, blocks: int) -> None:
        """All these layers of a piece, in so many of its blocks."""
        self._left[layers.start] -= blocks
        if not self._left[layers.start]:
            del self._left[layers.start]

    @property
    def layers(self) -> int:
        return min(self._left, default=self._layers)
