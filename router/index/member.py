"""One worker in the prefix index: which life of it, how far its events are known, and what is in doubt."""

from dataclasses import dataclass, field
from enum import Enum

from baton.ids import WorkerId
from router.index.block_table import Column


class Doubt(Enum):
    """Why a worker's blocks may be others than the index says."""

    NO_SNAPSHOT = "no snapshot yet"
    EVENTS_MISSING = "events are missing"
    REDIS_AWAY = "Redis is away"
    INDEX_FULL = "the index is full"


@dataclass(frozen=True, slots=True)
class Freshness:
    doubts: tuple[Doubt, ...] = ()
    since_s: float = 0.0
    """On the index's clock: when the first of the doubts came up."""

    @property
    def is_fresh(self) -> bool:
        return not self.doubts


FRESH = Freshness()


@dataclass(slots=True, eq=False)
class Member:
    """From `join` to `leave` or to the next epoch."""

    worker_id: WorkerId
    epoch: str
    slot: int
    column: Column
    sequence: int | None = None
    """Of the last batch that is known with all before it; None without a snapshot."""
    doubts: dict[Doubt, float] = field(default_factory=dict)
    """Since when, on the index's clock."""
    is_here: bool = True

    @property
    def freshness(self) -> Freshness:
        return Freshness(tuple(self.doubts), min(self.doubts.values())) if self.doubts else FRESH
