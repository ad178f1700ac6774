"""A small engine over a pool and a store: prompts from a tree of blocks, restores that are taken when they have ended,
and everything that could be wrong looked at after each step."""

import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from baton.ids import BlockHash, BlockId, tenant_tag
from baton.latency import Tier
from kvcache.block_pool import BlockPool
from kvcache.eviction.interface import Candidates, Counts, Floats
from kvcache.tiers.interface import Owner, Restore, Slot, SlotHeader
from kvcache.tiers.store import StoreShape, TierStore
from tests.kvcache.tiers.fake_io import FakeIo, content_of

ROW_BYTES = 100
ROOT = BlockHash(b"root" * 4)
TENANTS = [tenant_tag(name) for name in "ab"]
DISK_ERROR = OSError(errno.EIO, "Input/output error")


class OldestFirst:
    """A KeepPolicy: least recently used."""

    def __init__(self) -> None:
        self.counts: dict[BlockHash, int] = {}

    def seen(self, names: Sequence[BlockHash], depths: Counts, now_s: float) -> Counts:  # noqa: ARG002
        before = [self.counts.get(name, 0) for name in names]
        self.counts.update((name, count + 1) for name, count in zip(names, before, strict=True))
        return np.array(before, np.int32)

    def values(self, blocks: Candidates) -> Floats:
        return 1.0 / (1.0 + blocks.age_s)


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Running:
    """A prompt whose restore has not ended."""

    names: tuple[BlockHash, ...]
    blocks: list[BlockId]
    first: int
    restored: int
    owner: Owner
    restore: Restore | None = None


@dataclass
class World:
    blocks: int = 12
    ddr_slots: int = 6
    ssd_slots: int = 10
    bytes_in_flight_max: int = 4 * ROW_BYTES
    seed: int = 0
    ssd: dict[Slot, tuple[SlotHeader, int]] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    wall: Clock = field(default_factory=lambda: Clock(1.7e9))

    def __post_init__(self) -> None:
        self.io = FakeIo(self.blocks, self.ssd, ROW_BYTES)
        self.policy = OldestFirst()
        shape = StoreShape(
            *(self.blocks, self.ddr_slots, self.ssd_slots, ROW_BYTES, ROW_BYTES, "none", self.bytes_in_flight_max)
        )
        self.store = TierStore(
            *(shape, lambda _: self.io, self.policy, lambda _: 1.0, np.random.default_rng(self.seed)),
            clock=self.clock,
            wall_clock=self.wall,
        )
        self.pool = BlockPool(self.blocks, self.store)
        self.running: list[Running] = []
        self.mirror: dict[BlockHash, Tier] = {}

    # ---- what an engine does

    def pump(self) -> None:
        self.store.pump(self.pool)

    def begin(self, names: Sequence[BlockHash], owner: Owner, blocks_restored_max: int = 100) -> Running | None:
        """Holds what is in HBM, begins to restore what lies below; None: no room."""
        match = self.pool.match(names)
        hits = len(match.blocks)
        if len(names) - hits > self.pool.available - match.idle:
            return None
        self.pool.hold(match.blocks)
        below = self.store.locate(names[hits:])[:blocks_restored_max]
        self.store.used(names[: hits + len(below)], owner)
        new = self.pool.allocate(len(names) - hits)
        running = Running(tuple(names), [*match.blocks, *new], hits, len(below), owner)
        if below:
            running.restore = self.store.restore(names[hits : hits + len(below)], new[: len(below)])
        self.running.append(running)
        return running

    def finish(self, running: Running) -> None:
        """Takes what was restored, computes the rest, publishes all and lets go of it."""
        self.running.remove(running)
        good = running.first
        if running.restore is not None:
            running.restore.cancel()
            result = running.restore.result
            assert result is not None
            good += result.good
            for at in range(running.first, good):
                assert self.io.pool[running.blocks[at]] == content_of(running.names[at]), "wrong content served"
            assert all(
                digest == content_of(name)
                for digest, name in zip(result.digests, running.names[running.first :], strict=False)
            )
        for at in range(good, len(running.names)):
            self.io.pool[running.blocks[at]] = content_of(running.names[at])
        self.store.published(ROOT, running.names, running.first, running.owner)
        for at in range(running.first, len(running.names)):
            self.pool.publish(running.blocks[at], running.names[at])
        self.pool.release(running.blocks)

    def run(self, names: Sequence[BlockHash], owner: Owner | None = None) -> bool:
        running = self.begin(names, owner or Owner(TENANTS[0]))
        if running is None:
            return False
        if running.restore is not None:
            self.io.end_all()
        self.finish(running)
        return True

    def settle(self) -> None:
        """Pumps until nothing moves any more."""
        for _ in range(100):
            self.pump()
            if not self.io.jobs and not self.io.restores:
                self.pump()
                if not self.io.jobs:
                    return
            self.io.end_all()
        raise AssertionError("it never settles")

    # ---- what must be so

    def check(self, universe: Sequence[BlockHash]) -> None:
        self.store.check_integrity()
        self.pool.check_integrity()
        for name in self.store.changed():
            tier = self.store.tier_of(name)
            if tier is None:
                self.mirror.pop(name, None)
            else:
                self.mirror[name] = tier
        for name in universe:
            assert self.mirror.get(name) == self.store.tier_of(name), "a change was not told"
            block = self.pool.find(name)
            assert (self.store.tier_of(name) == "hbm") == (block is not None)
            assert block is None or self.io.pool[block] == content_of(name)


def chain(*path: int) -> list[BlockHash]:
    """The names of a prompt: equal beginnings are equal blocks."""
    return [BlockHash(sha256(repr(path[:at]).encode()).digest()[:16]) for at in range(1, len(path) + 1)]


class Chaos:
    """Steps that are drawn by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        self.world = World(blocks=pick([4, 8, 12]), ddr_slots=pick([1, 3, 6]), ssd_slots=pick([0, 3, 10]), seed=seed)
        self.universe = sorted({name for path in self._paths() for name in chain(*path)})
        self.steps: list[tuple[Callable[[], None], int]] = [
            (self.start, 8),
            (self.finish, 8),
            (self.pump, 8),
            (self.end_job, 8),
            (self.end_restore, 4),
            (self.fail, 1),
            (self.corrupt, 1),
            (self.clear, 1),
            (self.pass_time, 2),
            (self.tell, 2),
            (self.restart, 1),
        ]
        self.is_loss_allowed = False

    @staticmethod
    def _paths() -> list[tuple[int, ...]]:
        return [(a, b, c, d) for a in range(2) for b in range(2) for c in range(2) for d in range(2)]

    def step(self) -> None:
        """One, and what must be so after it."""
        promised, corrupt = self._promised(), self.world.store.corrupt_blocks
        self.is_loss_allowed = False
        steps, weights = zip(*self.steps, strict=True)
        self.random.choices(steps, weights)[0]()
        self.world.check(self.universe)
        if not self.is_loss_allowed and corrupt == self.world.store.corrupt_blocks:
            lost = [name for name in promised if self.world.store.tier_of(name) is None]
            assert not lost, "a promise was broken"

    def _promised(self) -> set[BlockHash]:
        """What lies below HBM under a promise that is not over."""
        shelves = self.world.store._shelves
        rows = [row for row in shelves.promises if shelves.index.lies_below(row)]
        now = self.world.wall.now_s
        return {shelves.index.table.name(row) for row in rows if shelves.promises.keep_until(row) > now}

    def start(self) -> None:
        if len(self.world.running) < 3:
            path = self.random.choice(self._paths())[: self.random.randint(1, 4)]
            promise = self.random.choice([(0.0, False)] * 4 + [(5.0, False), (0.0, True)])
            owner = Owner(self.random.choice(TENANTS), *promise, quota_bytes=self.random.choice([0, 2, 5]) * ROW_BYTES)
            self.world.begin(chain(*path), owner, self.random.randint(0, 4))

    def finish(self) -> None:
        if self.world.running:
            self.world.finish(self.random.choice(self.world.running))

    def pump(self) -> None:
        self.world.pump()

    def end_job(self) -> None:
        if self.world.io.jobs:
            self.world.io.end(self.random.choice(self.world.io.jobs))

    def end_restore(self) -> None:
        if self.world.io.restores:
            self.random.choice(self.world.io.restores).end()

    def fail(self) -> None:
        self.is_loss_allowed = True
        if self.world.io.jobs and self.random.random() < 0.5:
            self.world.io.end(self.random.choice(self.world.io.jobs), DISK_ERROR)
        elif self.world.io.restores:
            self.random.choice(self.world.io.restores).end(DISK_ERROR)
        self.world.pump()

    def corrupt(self) -> None:
        """What nobody is about to copy on: that would be seen later, when it is restored."""
        io = self.world.io
        if io.ssd and self.random.random() < 0.5:
            slot = self.random.choice(sorted(io.ssd))
            io.ssd[slot] = io.ssd[slot][0], 666
        elif io.ddr and not io.jobs:
            io.ddr[self.random.choice(sorted(io.ddr))] = 666

    def clear(self) -> None:
        self.is_loss_allowed = True
        if self.random.random() < 0.5:  # an engine clears its pool first
            self.world.pool.forget(self.world.pool.published())
        self.world.store.clear(self.random.choice([None, *TENANTS]))

    def pass_time(self) -> None:
        seconds = self.random.choice([0.1, 1.0, 10.0])
        self.world.clock.now_s += seconds
        self.world.wall.now_s += seconds

    def tell(self) -> None:
        store, names = self.world.store, self.random.sample(self.universe, 5)
        store.note_copies([(name, self.random.randrange(300)) for name in names])
        store.pin(names[:2], self.world.clock.now_s + self.random.choice([0.5, 5.0]))
        store.digested(names, [content_of(name) for name in names])
        assert len(store.doubtful(3)) <= 3
        assert len(store.hottest(2)) <= 2
        store.states()

    def restart(self) -> None:
        """Kill -9: what is on the disk stays there."""
        self.is_loss_allowed = True
        old = self.world
        self.world = World(old.blocks, old.ddr_slots, old.ssd_slots, ssd=old.io.ssd, clock=old.clock, wall=old.wall)

    def end(self) -> None:
        """Everything ends, and everything that was held has been let go."""
        while self.world.running:
            self.finish()
        self.world.settle()
        self.world.check(self.universe)
        self.world.store.close()
        assert not self.world.pool.holders()
