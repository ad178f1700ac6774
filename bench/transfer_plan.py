"""What bench.transfer moves. Pure, and of the standard library alone: the peer's interpreter reads it too."""

from collections.abc import Iterable
from dataclasses import dataclass

KIB, MIB, GIB = 2**10, 2**20, 2**30
SLICE_BYTES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
TOTAL_BYTES = (MIB, 16 * MIB, 256 * MIB, GIB)
LAYERS_MAX = 32
LAYER_BLOCKS_MIN = 16
"""Blocks written in one layer at a time, where there are as many: what a chunk of 512 tokens is in blocks of 32."""
TAIL_BYTES = 64
"""At the end of every slice: compared on both ends, and different in each."""


@dataclass(frozen=True, slots=True)
class Form:
    """Blocks in each of some layers; a block has two slices in a layer, its keys and its values."""

    slice_bytes: int
    layers: int
    blocks: int

    @classmethod
    def of(cls, slice_bytes: int, total_bytes: int) -> "Form":
        """Both powers of two, and at least one block."""
        layer_blocks = total_bytes // (2 * slice_bytes)
        assert layer_blocks * 2 * slice_bytes == total_bytes
        layers = min(LAYERS_MAX, max(1, layer_blocks // LAYER_BLOCKS_MIN))
        return cls(slice_bytes, layers, layer_blocks // layers)

    @property
    def slices(self) -> int:
        return 2 * self.layers * self.blocks

    @property
    def total_bytes(self) -> int:
        return self.slices * self.slice_bytes


def forms_of(slice_bytes: int, totals: Iterable[int]) -> list[Form]:
    """Smallest first; without the totals that are not as much as a block."""
    return [Form.of(slice_bytes, total) for total in sorted(totals) if total >= 2 * slice_bytes]


def hull(forms: Iterable[Form]) -> Form:
    """What all of them, in slices of one size, fit into."""
    forms = list(forms)
    return Form(forms[0].slice_bytes, max(form.layers for form in forms), max(form.blocks for form in forms))
