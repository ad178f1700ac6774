"""KV events: what workers tell routers about their prefix caches, through a Redis stream for each worker."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from baton.rpc import events_pb2, worker_pb2

NAME_BYTES = 16
SNAPSHOT_MESSAGE_BLOCKS = 8192
"""In one message of a snapshot: 128 KiB of names, which a router takes in within a millisecond or two."""
_TO_PROTO: Mapping[Tier, events_pb2.Tier] = {
    "hbm": events_pb2.TIER_HBM,
    "ddr": events_pb2.TIER_DDR,
    "ssd": events_pb2.TIER_SSD,
}
_FROM_PROTO: Mapping[int, Tier] = {number: tier for tier, number in _TO_PROTO.items()}


def stream_key(key_prefix: str, worker_id: WorkerId) -> str:
    """Hash-tagged like the membership's keys, so that all lie in one slot of a Redis Cluster."""
    return f"{{{key_prefix}}}:cache-events:{worker_id}"


class MalformedEvents(ValueError):
    """What came is no batch of events: some other program's, or some other version's."""


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


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """A numbered batch of changes. Names are packed: 16 bytes each, one after the other.

    Every change is an assignment - this block is in that tier now, or in none - so a batch that is applied to a
    state which holds part of it already gives the same as one applied to a state which does not.
    """

    epoch: str
    sequence: int
    stored: Mapping[Tier, bytes] = field(default_factory=dict)
    moved: Mapping[Tier, bytes] = field(default_factory=dict)
    removed: bytes = b""

    @classmethod
    def of(cls, epoch: str, sequence: int, changes: CacheChanges) -> "CacheEvents":
        stored = {tier: b"".join(names) for tier, names in changes.stored.items()}
        moved = {tier: b"".join(names) for tier, names in changes.moved.items()}
        return cls(epoch, sequence, stored, moved, b"".join(changes.removed))

    @property
    def blocks(self) -> int:
        """How many changes it tells."""
        sizes = (len(names) for names in (*self.stored.values(), *self.moved.values(), self.removed))
        return sum(sizes) // NAME_BYTES

    def to_bytes(self) -> bytes:
        return events_pb2.CacheEvents(
            epoch=self.epoch,
            sequence=self.sequence,
            stored=_to_sets(self.stored),
            moved=_to_sets(self.moved),
            removed=self.removed,
        ).SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes) -> "CacheEvents":
        """Raises MalformedEvents."""
        try:
            message = events_pb2.CacheEvents.FromString(data)
        except DecodeError:
            raise MalformedEvents("This is no batch of KV events.") from None
        stored, moved = from_sets(message.stored), from_sets(message.moved)
        return cls(message.epoch, message.sequence, stored, moved, _whole(message.removed))


@dataclass(frozen=True, slots=True)
class CacheInventory:
    """All blocks that a worker's cache holds: the batches up to `sequence` are in it, and perhaps part of the next."""

    epoch: str
    sequence: int
    blocks: Mapping[Tier, bytes]
    """Packed names."""

    def messages(self) -> Iterator[worker_pb2.CacheSnapshot]:
        """The answer to GetCacheSnapshot: one message at least."""
        size = SNAPSHOT_MESSAGE_BLOCKS * NAME_BYTES
        pieces = (
            (tier, names[at : at + size]) for tier, names in self.blocks.items() for at in range(0, len(names), size)
        )
        first = next(pieces, None)
        yield self._message(*([first] if first else []))
        for piece in pieces:
            yield self._message(piece)

    def _message(self, *pieces: tuple[Tier, bytes]) -> worker_pb2.CacheSnapshot:
        return worker_pb2.CacheSnapshot(epoch=self.epoch, sequence=self.sequence, blocks=_to_sets(dict(pieces)))


def from_sets(sets: Iterable[events_pb2.BlockSet]) -> dict[Tier, bytes]:
    """Packed names by tier; a tier that this version does not know is left out. Raises MalformedEvents."""
    found: dict[Tier, bytes] = {}
    for each in sets:
        if tier := _FROM_PROTO.get(each.tier):
            found[tier] = found.get(tier, b"") + _whole(each.block_hashes)
    return found


def _to_sets(blocks: Mapping[Tier, bytes]) -> list[events_pb2.BlockSet]:
    return [events_pb2.BlockSet(tier=_TO_PROTO[tier], block_hashes=names) for tier, names in blocks.items()]


def _whole(names: bytes) -> bytes:
    if len(names) % NAME_BYTES:
        raise MalformedEvents("The names of blocks are not 16 bytes each.")
    return names


def unpack(names: bytes) -> list[BlockHash]:
    return [BlockHash(names[at : at + NAME_BYTES]) for at in range(0, len(names), NAME_BYTES)]
