"""What is known of a block beside where it lies: one byte of bits."""

from typing import Final


class Mark:
    """Bits; plain numbers, because enum's take a microsecond each."""

    DIGESTED: Final = 1
    """`digest` is known: of its row below HBM, or else of its block in HBM."""
    MOVING: Final = 2
    """On its way down: it is copied nowhere else meanwhile, and stays where it is."""
    GOING: Final = 4
    """Copied down because HBM would soon evict it, and not used since."""
    FROM_BELOW: Final = 8
    """Its block in HBM was restored from its slot: the same bytes."""
    PROMISED: Final = 16
    PINNED: Final = 32
    """A peer is about to read it."""
    DECLINED: Final = 64
    """Dropped from DDR, or moved on, although HBM would soon evict it, and not used since: it has been weighed, and is
    not copied down again before HBM does evict it."""
    BUSY: Final = MOVING | PINNED
