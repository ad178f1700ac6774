"""What the engine tells layer by layer, handed to the loop in fewer and larger pieces.

To wake the loop costs the engine's thread a turn of the interpreter lock, and many small writes cost more than few. So
layers are gathered until there is enough to be worth it; the last of a step brings the rest.
"""

from collections.abc import Callable, Sequence

from baton.layout import KVLayout
from engine.interface import BlocksWritten

GATHER_BYTES = 4 * 2**20
"""About a third of a millisecond at what memory or a fast network moves; a slow link is behind the layers anyway."""

Layer = tuple[int, Sequence[BlocksWritten]]


class LayerGatherer:
    """On the engine's thread."""

    def __init__(self, layout: KVLayout, deliver: Callable[[Sequence[Layer]], object]) -> None:
        self._last_layer, self._block_bytes = layout.layers - 1, 2 * layout.slice_bytes
        self._deliver = deliver
        self._gathered: list[Layer] = []
        self._bytes = 0

    def written(self, layer: int, written: Sequence[BlocksWritten]) -> None:
        """A LayerListener."""
        if layer == 0:
            self._clear()  # a step that failed half-way left its layers
        self._gathered.append((layer, written))
        self._bytes += self._block_bytes * sum(event.end - event.first for event in written)
        if self._bytes >= GATHER_BYTES or layer == self._last_layer:
            self._deliver(self._gathered)
            self._clear()

    def _clear(self) -> None:
        self._gathered, self._bytes = [], 0
