"""Where a KV block lies: the arithmetic of a worker's region."""

import math
from dataclasses import dataclass

from baton.ids import BlockId

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


PROBE_BLOCKS = 2
"""At the end of a worker's region and never in its pool: links are tested with them."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A region is `[layer][k|v][block][token in block][kv head][head dim]`, contiguous.

    A *slice* is one block's keys or values in one layer: `[token in block][kv head][head dim]`,
    the unit that transports move. Because the place of a slice is arithmetic, messages carry block
    ids and never addresses.
    """

    layers: int
    blocks: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (self.layers, 2, self.blocks, self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def pool_blocks(self) -> int:
        """All but the probe blocks."""
        return self.blocks - PROBE_BLOCKS

    @property
    def probe_source(self) -> BlockId:
        """What is sent to test a link: random bytes, written once."""
        return BlockId(self.blocks - 2)

    @property
    def probe_target(self) -> BlockId:
        """Where others write to test a link."""
        return BlockId(self.blocks - 1)

    @property
    def slice_bytes(self) -> int:
        return self.block_tokens * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """One block's keys and values in all layers."""
        return 2 * self.layers * self.slice_bytes

    @property
    def region_bytes(self) -> int:
        return self.blocks * self.block_bytes

    def slice_offset(self, layer: int, kv: int, block: int) -> int:
        """Bytes from the start of the region to a slice; `kv` is 0 for keys, 1 for values."""
        assert 0 <= layer < self.layers and kv in (0, 1) and 0 <= block < self.blocks
        return ((layer * 2 + kv) * self.blocks + block) * self.slice_bytes

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return math.ceil(tokens / self.block_tokens)

    def is_compatible(self, other: "KVLayout") -> bool:
        """Whether slices of one can be written into the other as they are: all but the number of blocks is equal."""
        return self.shape[:2] + self.shape[3:] == other.shape[:2] + other.shape[3:] and self.dtype == other.dtype

    def unconvertible(self, other: "KVLayout") -> str | None:
        """Why KV in this layout cannot be cut into the other's blocks on its way, as a sentence; None: it can."""
        names = ("layers", "kv_heads", "head_dim", "dtype")
        unequal = [name for name in names if getattr(self, name) != getattr(other, name)]
        if not unequal:
            return None
        values = ", ".join(f"{name} {getattr(self, name)} and {getattr(other, name)}" for name in unequal)
        return f"The KV layouts of sender and receiver differ: {values}; all but block_tokens must be equal."
