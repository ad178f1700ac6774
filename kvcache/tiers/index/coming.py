"""What is known of a block before the pool has it: which prompt's it is, and where in that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from baton.ids import BlockHash, TenantTag
from kvcache.tiers.index.tier_index import TierIndex
from kvcache.tiers.interface import Owner

NOBODYS: Final = Owner(TenantTag(bytes(8)))


@dataclass(frozen=True, slots=True)
class Coming:
    """A prompt of which blocks are about to be published."""

    root: BlockHash
    names: Sequence[BlockHash]
    owner: Owner
    depths: dict[BlockHash, int]
    """Of those that lie in no tier yet."""

    def enter(self, index: TierIndex, name: BlockHash, now_s: float) -> int:
        """Its row. A block that nobody told of has no known predecessor and is nobody's."""
        depth = self.depths.get(name)
        if depth is None:
            return index.add(name, None, 0, NOBODYS.tenant, now_s)
        parent = self.names[depth - 1] if depth else self.root
        return index.add(name, parent, depth, self.owner.tenant, now_s)
