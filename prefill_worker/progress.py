"""How far one ticket's blocks are: final here, written, landed, told. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """In one layer, the ticket's blocks `[first, end)`."""

    layer: int
    first: int
    end: int

    @property
    def blocks(self) -> int:
        return self.end - self.first


class SendProgress:
    """Blocks become final in order in each layer and are sent in order, so two numbers per layer are the whole queue:
    what waits is merged with what follows it, however long the link is behind.

    Block numbers are indices into the ticket's blocks.
    """

    def __init__(self, layers: int, blocks: int, piece_blocks_max: int) -> None:
        self.blocks = blocks
        self._piece_blocks_max = piece_blocks_max
        self._final = [0] * layers
        self._written = [0] * layers
        self._again: list[int] = []
        self.fenced = 0
        """Blocks that lie in the receiver's region in all layers."""
        self.digests: list[int] = []
        """Of the leading blocks."""
        self.told = 0

    # ---- what happens

    def final(self, layer: int, end: int) -> None:
        """All blocks before `end` have their final content in this layer."""
        self._final[layer] = max(self._final[layer], min(end, self.blocks))

    def written(self, piece: Piece) -> None:
        assert piece.first == self._written[piece.layer]
        self._written[piece.layer] = piece.end

    def landed(self) -> None:
        """A fence has returned."""
        self.fenced = min(self._written, default=self.blocks)

    def digested(self, first: int, digests: tuple[int, ...]) -> None:
        """In order. `first` may be negative: those before the ticket's first block are dropped."""
        assert first <= len(self.digests)
        self.digests += digests[len(self.digests) - first :]

    # ---- what to do

    def next_piece(self) -> Piece | None:
        """Of the layers that have something to send, the one that is furthest behind, and of these the lowest: so that
        whole blocks are complete soon."""
        waiting = [
            (written, layer)
            for layer, (written, final) in enumerate(zip(self._written, self._final, strict=True))
            if written < final
        ]
        if not waiting:
            return None
        first, layer = min(waiting)
        return Piece(layer, first, min(self._final[layer], first + self._piece_blocks_max))

    @property
    def completes_blocks(self) -> bool:
        """Whether a fence now would let blocks land whole."""
        return min(self._written, default=0) > self.fenced

    def next_landed(self) -> tuple[int, list[int]] | None:
        """First block and digests of those that have landed and are not yet told; then they count as told."""
        first, end = self.told, min(self.fenced, len(self.digests))
        if first >= end:
            return None
        self.told = end
        return first, self.digests[first:end]

    @property
    def is_done(self) -> bool:
        return self.told >= self.blocks
