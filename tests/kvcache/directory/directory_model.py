"""What the directory's scripts should do, in plain Python."""

from dataclasses import dataclass, field

from baton.ids import BlockHash
from kvcache.directory.scripts import HOLDERS_MAX, NO_NEWS


@dataclass
class Registered:
    worker: str
    epoch: str
    token: str
    until_ms: int
    number: int = 0
    pins: list[tuple[int, tuple[BlockHash, ...]]] = field(default_factory=list)


class DirectoryModel:
    """Answers as the scripts do, but for the times in them."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.drawn = 0
        self.registered: dict[int, Registered] = {}
        self.blocks: dict[BlockHash, dict[int, int]] = {}
        """name -> holder -> tier; in the order in which they came."""

    def is_alive(self, holder: int) -> bool:
        known = self.registered.get(holder)
        return known is not None and known.until_ms > self.now_ms

    def holder_of(self, worker: str) -> int | None:
        return next((holder for holder, known in self.registered.items() if known.worker == worker), None)

    def register(self, worker: str, epoch: str, token: str, is_fresh: bool, lease_ms: int) -> int | None:
        """None: replaced."""
        current = self.holder_of(worker)
        if current is not None:
            if self.registered[current].epoch != epoch and not is_fresh and self.is_alive(current):
                return None
            del self.registered[current]
        self.drawn += 1
        self.registered[self.drawn] = Registered(worker, epoch, token, self.now_ms + lease_ms)
        return self.drawn

    def sync(
        self, holder: int, token: str, number: int, as_of_ms: int, lease_ms: int, changes: dict[BlockHash, int | None]
    ) -> list[int] | str:
        """The counts, or what it says instead."""
        known = self.registered.get(holder)
        if known is None or known.token != token or not self.is_alive(holder) or number > known.number + 1:
            return "unknown"
        if number <= known.number:
            return "again"
        until_ms = min(self.now_ms, as_of_ms) + lease_ms
        if until_ms <= self.now_ms:
            return "unknown"
        known.number, known.until_ms = number, until_ms
        assigned = sorted(
            ((name, tier) for name, tier in changes.items() if tier is not None), key=lambda each: each[1]
        )
        counts = [self._assign(holder, name, tier) for name, tier in assigned]
        for name, tier in changes.items():
            if tier is None:
                self.blocks.get(name, {}).pop(holder, None)
        return counts

    def _assign(self, holder: int, name: BlockHash, tier: int) -> int:
        alive = {other: there for other, there in self.blocks.get(name, {}).items() if self.is_alive(other)}
        held = alive.pop(holder, None) is not None
        count = len(alive)
        if count < HOLDERS_MAX:
            alive[holder] = tier
        self.blocks[name] = alive
        return NO_NEWS if held else count

    def leave(self, holder: int, token: str) -> None:
        known = self.registered.get(holder)
        if known and known.token == token:
            del self.registered[holder]

    def look_up(self, name: BlockHash) -> dict[str, int]:
        """Worker -> tier."""
        found = self.blocks.get(name, {})
        return {self.registered[holder].worker: tier for holder, tier in found.items() if self.is_alive(holder)}

    def pin(self, worker: str, names: tuple[BlockHash, ...], ttl_ms: int) -> list[int | None]:
        """Tiers."""
        holder = self.holder_of(worker)
        if holder is None or not self.is_alive(holder):
            return [None] * len(names)
        tiers = [self.blocks.get(name, {}).get(holder) for name in names]
        held = tuple(name for name, tier in zip(names, tiers, strict=True) if tier is not None)
        if held:
            self.registered[holder].pins.append((self.now_ms + ttl_ms, held))
        return tiers
