"""How a restore is cut into pieces, in which order, and which of its blocks are verified. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from baton.layout import KVLayout
from kvcache.tiers.interface import LowerTier
from kvcache.tiers.io_interface import IoSizes, RestorePart, VerifyDdr
from kvcache.tiers.io_threads import THREADS

SAMPLE_EVERY = 16
"""Of the blocks from DDR, where a sample is verified."""


@dataclass(frozen=True, slots=True)
class RestorePiece:
    """These layers of the parts at these positions, all of one tier and stored alike."""

    tier: LowerTier
    positions: tuple[int, ...]
    layers: range
    is_staged: bool
    """Rows are read or decoded into staging memory first, whole."""


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore is going to do."""

    parts: Sequence[RestorePart]
    pieces: Sequence[RestorePiece]
    """In the order in which they should run."""
    layers: int
    row_bytes: int
    """Of one block in the pool."""
    checks: frozenset[int]
    """Positions that are verified."""
    late_checks: Sequence[tuple[int, ...]]
    """Of these, in the order of the run: what lands layer by layer is verified when all layers have landed, so many
    together; the others at once."""


def plan_restore(
    parts: Sequence[RestorePart], layout: KVLayout, sizes: IoSizes, staging_rows: int, verify: VerifyDdr, turn: int
) -> RestorePlan:
    """A `turn` of its own for each restore."""
    pieces = restore_pieces(parts, layout, sizes, staging_rows)
    checks = to_verify(parts, verify, turn)
    late = sorted(at for at in checks if parts[at].tier == "ddr" and parts[at].storage == "none")
    together = min(sizes.piece_bytes // layout.block_bytes, -(-len(late) // THREADS))
    late_checks = list(chunks(late, max(1, together)))
    return RestorePlan(parts, pieces, layout.layers, layout.block_bytes, checks, late_checks)


def restore_pieces(
    parts: Sequence[RestorePart], layout: KVLayout, sizes: IoSizes, staging_rows: int
) -> list[RestorePiece]:
    """From the SSD a row is read whole, header and all, so none of its layers lands before the others; the same goes
    for rows that are decoded. No layer has landed before these have, so they come first, in the order of their slots,
    because adjacent slots are read in one call. What lies in DDR as it is comes by groups of layers, lowest first:
    the engine computes on the first ones while the next are copied.
    """
    staged = sorted(
        (at for at, part in enumerate(parts) if part.tier == "ssd" or part.storage != "none"),
        key=lambda at: (parts[at].tier == "ddr", parts[at].storage, parts[at].slot),
    )
    pieces = [
        RestorePiece(tier, some, range(layout.layers), True)
        for (tier, _), alike in groupby(staged, lambda at: (parts[at].tier, parts[at].storage))
        for some in chunks(list(alike), staging_rows)
    ]
    in_layers = [at for at, part in enumerate(parts) if part.tier == "ddr" and part.storage == "none"]
    return pieces + list(layer_pieces(in_layers, layout, sizes))


def layer_pieces(positions: Sequence[int], layout: KVLayout, sizes: IoSizes) -> Iterator[RestorePiece]:
    """Group by group, each cut into pieces."""
    if not positions:
        return
    layer_bytes = layout.block_bytes // layout.layers
    group = min(layout.layers, -(-sizes.group_bytes // (layer_bytes * len(positions))))
    for first in range(0, layout.layers, group):
        layers = range(first, min(first + group, layout.layers))
        for some in chunks(positions, max(1, sizes.piece_bytes // (layer_bytes * len(layers)))):
            yield RestorePiece("ddr", some, layers, False)


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
        self._left = Counter(piece.layers.start for piece in pieces)
        """Pieces by their lowest layer."""

    def landed(self, piece: RestorePiece) -> None:
        self._left[piece.layers.start] -= 1
        if not self._left[piece.layers.start]:
            del self._left[piece.layers.start]

    @property
    def layers(self) -> int:
        return min(self._left, default=self._layers)
