"""Workers that race for the same blocks, with every fault at every place, on a real Redis whose time is ours.

`python -m tests.kvcache.directory.directory_world 10000` runs so many interleavings.
"""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import redis

from baton.clock import ManualClock
from baton.cluster import cache_ledger
from baton.cluster.cache_events import CacheChanges
from baton.cluster.cache_ledger import CacheLedger
from baton.cluster.lease import Lease
from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS, Tier
from kvcache.directory import calls
from kvcache.directory.calls import Call, Holder, Scope
from kvcache.directory.reporter import Reporter
from tests.kvcache.directory.directory_redis import blocks, carry_out, plain_client

LEASE = Lease()
LEASE_MS = round(LEASE.expiry_s * 1000)
NAMES = blocks(*range(4))
STEPS = 24
WRITE_BATCHES_MAX, BATCH_BLOCKS_MAX = 1, 2
"""So small that a write leaves something untold now and then."""
Named = dict[BlockHash, set[Holder]]


@dataclass
class Life:
    """One process of a worker: its ledger and its reporter, as a CacheEventPublisher would drive them."""

    ledger: CacheLedger
    reporter: Reporter
    told: int = 0
    """Batches taken since the last write that succeeded."""
    promised: set[BlockHash] = field(default_factory=set)
    """Pins that it must learn of, unless it has to register anew."""
    learnt: set[BlockHash] = field(default_factory=set)

    def begin(self) -> list[Call]:
        while self.ledger.has_news and self.told < WRITE_BATCHES_MAX:
            self.reporter.told(self.ledger.take())
            self.told += 1
        return self.reporter.begin(is_complete=not self.ledger.has_news)

    def finish(self, answers: Sequence[object]) -> None:
        self.told = 0
        before = self.reporter.registered
        news = self.reporter.finish(answers)
        self.learnt.update(name for pin in news.pins for name in pin.names)
        if self.reporter.registered is not before:
            self.promised.clear()


class World:
    def __init__(self, client: "redis.Redis", seed: int) -> None:
        self.client, self.random = client, random.Random(seed)
        self.now_ms = 10_000_000
        self.workers = [WorkerId(name) for name in "abc"[: self.random.choice((2, 3))]]
        self.clocks = {worker: ManualClock(self.random.uniform(0, 1e6)) for worker in self.workers}
        self.lives: dict[WorkerId, Life] = {}
        self.truth: dict[WorkerId, dict[BlockHash, Tier]] = {worker: {} for worker in self.workers}
        self.last_true_ms: dict[tuple[BlockHash, Holder], int] = {}
        self.late: list[list[Call]] = []
        """Writes that were given up by who sent them, and are still on their way."""
        self.snapshot: dict[bytes, bytes] = {}
        """What a replica has: Redis may fall back to it."""
        self.drawn = 0
        client.flushall()
        for worker in self.workers:
            self.restart(worker)

    # ---- what happens

    def step(self) -> None:
        worker = self.random.choice(self.workers)
        weights = {
            self.change: 6,
            self.write: 9,
            self.pass_time: 3,
            self.die: 1,
            self.restart: 1,
            self.pin: 1,
            self.deliver_late: 1,
            self.lose: 0.3,
            self.replicate: 1.5,
            self.fail_over: 0.8,
            self.wipe: 0.2,
        }
        act = self.random.choices(list(weights), list(weights.values()))[0]
        act(worker)
        self.check()

    def change(self, worker: WorkerId) -> None:
        """Some blocks are stored, moved or removed, in the worker and in its ledger at once."""
        if worker not in self.lives:
            return
        for name in self.random.sample(NAMES, self.random.randint(1, 3)):
            there, tier = name in self.truth[worker], self.random.choice((None, *TIERS))
            self.put(worker, name, tier)
            if tier is None:
                changes = CacheChanges(removed=(name,))
            else:
                changes = CacheChanges(moved={tier: (name,)}) if there else CacheChanges({tier: (name,)})
            self.lives[worker].ledger.record(changes)

    def write(self, worker: WorkerId) -> None:
        """What was sent may be lost, cut off, late, or carried out without an answer; meanwhile things change."""
        if worker not in self.lives:
            return
        life = self.lives[worker]
        sent = life.begin()
        fault = self.random.choice(("", "", "", "", "request", "reply", "cut", "late"))
        if self.random.random() < 0.3:
            self.change(worker)
            self.pass_ms(self.random.choice((1, 900, 4000)))
        if fault == "late":
            self.late.append(sent)
        if fault in ("request", "late"):
            return
        carried_out = sent[: self.random.randint(0, len(sent))] if fault == "cut" else sent
        answers = self.carry_out(carried_out)
        if self.random.random() < 0.2:
            self.change(worker)
            self.pass_ms(self.random.choice((1, 900)))
        if not fault:
            life.finish(answers)

    def pass_time(self, _: WorkerId) -> None:
        self.pass_ms(self.random.choice((10, 500, 1000, 3000, 5000, 7000)))

    def die(self, worker: WorkerId) -> None:
        """All that it held is gone; a write of its may still be on its way."""
        for name in list(self.truth[worker]):
            self.put(worker, name, None)
        if (life := self.lives.pop(worker, None)) and self.random.random() < 0.5:
            self.late.append(life.begin())

    def restart(self, worker: WorkerId) -> None:
        """With what it finds on its disk."""
        self.die(worker)
        self.drawn += 1
        ledger = CacheLedger(f"epoch {self.drawn}")
        kept = self.random.sample(NAMES, self.random.randint(0, 2))
        for name in kept:
            self.put(worker, name, "ssd")
        ledger.record(CacheChanges({"ssd": tuple(kept)}) if kept else CacheChanges())
        reporter = Reporter(
            *(self.scope, worker, ledger.epoch, lambda: ledger.inventory().blocks),
            *(LEASE, self.clocks[worker], self.draw_token),
        )
        self.lives[worker] = Life(ledger, reporter)

    def pin(self, worker: WorkerId) -> None:
        named = self.named()
        (answer,) = self.carry_out([calls.pin(self.scope, NAMES, worker, 30.0)])
        tiers = dict(zip(NAMES, calls.pinned(answer, len(NAMES)), strict=True))
        assert all(tier is None or Holder(worker, tier) in named[name] for name, tier in tiers.items())
        if (life := self.lives.get(worker)) and life.reporter.registered:
            life.promised.update(name for name, tier in tiers.items() if tier)

    def deliver_late(self, _: WorkerId) -> None:
        if self.late:
            self.carry_out(self.late.pop(self.random.randrange(len(self.late))))

    def lose(self, worker: WorkerId) -> None:
        if life := self.lives.get(worker):
            life.reporter.lost()
            life.promised.clear()

    def replicate(self, _: WorkerId) -> None:
        self.snapshot = {key: self.client.dump(key) for key in self.client.scan_iter()}

    def fail_over(self, worker: WorkerId) -> None:
        """To a replica that has not heard the latest."""
        self.wipe(worker)
        for key, value in self.snapshot.items():
            self.client.restore(key, 0, value)

    def wipe(self, _: WorkerId) -> None:
        self.client.flushall()
        for life in self.lives.values():
            life.promised.clear()

    # ---- the rules

    def check(self) -> None:
        """Nothing is named that has not been true for longer than a lease."""
        for name, holders in self.named().items():
            for holder in holders:
                if self.truth[holder.worker_id].get(name) != holder.tier:
                    gone_ms = self.now_ms - self.last_true_ms[name, holder]
                    assert gone_ms <= LEASE_MS, f"{holder} has been named for {gone_ms} ms since it was true"

    def heal(self) -> None:
        """Without faults the directory says what is there, soon, and nothing else."""
        self.late.clear()
        for _ in range(3):
            for life in self.lives.values():
                self.settle(life)
            self.pass_ms(2000)
        self.check()
        for life in self.lives.values():
            self.settle(life)
            assert life.promised <= life.learnt
        expected: Named = {name: set() for name in NAMES}
        for worker, held in self.truth.items():
            for name, tier in held.items():
                expected[name].add(Holder(worker, tier))
        assert self.named() == expected

    def settle(self, life: Life) -> None:
        """One heartbeat, and as many writes as it takes."""
        for _ in range(10):
            life.finish(self.carry_out(life.begin()))
            if not life.reporter.has_news and not life.ledger.has_news:
                return
        raise AssertionError("it does not come to rest")

    # ---- how

    @property
    def scope(self) -> Scope:
        return Scope("w", str(self.now_ms))

    def draw_token(self) -> str:
        self.drawn += 1
        return f"token {self.drawn}"

    def put(self, worker: WorkerId, name: BlockHash, tier: Tier | None) -> None:
        before = self.truth[worker].pop(name, None)
        if before:
            self.last_true_ms[name, Holder(worker, before)] = self.now_ms
        if tier:
            self.truth[worker][name] = tier

    def pass_ms(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        for clock in self.clocks.values():
            clock.advance(milliseconds / 1000)

    def carry_out(self, sent: Sequence[Call]) -> list[object]:
        """At Redis's time of now, whenever it was written."""
        now = [Call(call.script, call.key, (call.arguments[0], str(self.now_ms), *call.arguments[2:])) for call in sent]
        return carry_out(self.client, now)

    def named(self) -> Named:
        (answer,) = self.carry_out([calls.look_up(self.scope, NAMES)])
        return {name: set(holders) for name, holders in zip(NAMES, calls.holders(answer), strict=True)}


def run(client: "redis.Redis", seeds: Sequence[int]) -> None:
    with patch.object(cache_ledger, "BATCH_BLOCKS_MAX", BATCH_BLOCKS_MAX):
        for seed in seeds:
            try:
                run_one(World(client, seed))
            except AssertionError as error:
                raise AssertionError(f"with seed {seed}: {error}") from error


def run_one(world: World) -> None:
    for _ in range(STEPS):
        world.step()
    world.heal()


if __name__ == "__main__":
    start_s = time.monotonic()
    with EmbeddedRedis() as server, plain_client(server) as own_client:
        run(own_client, range(int(sys.argv[1])))
    print(f"{sys.argv[1]} interleavings of {STEPS} steps in {time.monotonic() - start_s:.0f} s")
