"""KV events: what workers tell routers about their prefix caches, through a Redis stream for each worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.ids import BlockHash
from baton.latency import Tier


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What one engine step did to a worker's prefix cache; applied in the order of the fields."""

    stored: Mapping[Tier, tuple[BlockHash, ...]] = field(default_factory=dict)
    moved: Mapping[Tier, tuple[BlockHash, ...]] = field(default_factory=dict)
    """To the tier named."""
    removed: tuple[BlockHash, ...] = ()
    """In no tier any more."""

    def __bool__(self) -> bool:
        return bool(self.stored or self.moved or self.removed)
