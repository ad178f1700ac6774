"""The prefix index against a model that is too simple to be wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.clock import ManualClock
from baton.cluster.cache_events import CacheChanges, CacheEvents
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS, Tier
from router.index.prefix_index import EXPECT_S, Applied, Doubt, PrefixIndex, PrefixLength

CHAINS = [[BlockHash(sha256(f"{chain}/{block}".encode()).digest()[:16]) for block in range(6)] for chain in range(3)]
# The first three share their first two blocks with each other.
for chain in CHAINS[1:]:
    chain[:2] = CHAINS[0][:2]
BLOCKS = sorted({block for chain in CHAINS for block in chain})
WORKERS = [WorkerId(f"w{number}") for number in range(5)]

some_blocks = st.lists(st.sampled_from(BLOCKS), max_size=6).map(tuple)
by_tier = st.dictionaries(st.sampled_from(TIERS), some_blocks, max_size=2)
changes = st.builds(CacheChanges, by_tier, by_tier, some_blocks)
workers = st.sampled_from(WORKERS)


@dataclass(eq=False)
class Life:
    """What the model knows of one life of a worker."""

    epoch: str
    sequence: int | None = None
    held: dict[BlockHash, Tier] = field(default_factory=dict)
    expected: set[BlockHash] = field(default_factory=set)
    doubts: set[Doubt] = field(default_factory=lambda: {Doubt.NO_SNAPSHOT})

    def change(self, change: CacheChanges) -> None:
        for each in (change.stored, change.moved):
            for tier, blocks in each.items():
                self.held |= dict.fromkeys(blocks, tier)
                self.expected -= set(blocks)
        for block in change.removed:
            self.held.pop(block, None)

    def expect(self, blocks: Sequence[BlockHash]) -> None:
        self.expected |= set(blocks) - self.held.keys()

    def prefix(self, chain: Sequence[BlockHash]) -> PrefixLength:
        counts = dict.fromkeys(TIERS, 0)
        for block in chain:
            if block not in self.held and block not in self.expected:
                break
            counts[self.held.get(block, "hbm")] += 1
        return PrefixLength(**counts)


@dataclass
class Sent:
    since_s: float
    due_s: float
    lives: list[Life]
    blocks: Sequence[BlockHash]


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.clock = ManualClock()
        self.index = PrefixIndex(10_000, self.clock)
        self.lives: dict[WorkerId, Life] = {}
        self.sent: list[Sent] = []
        self.epochs = 0

    @rule(worker=workers)
    def join(self, worker: WorkerId) -> None:
        self.epochs += 1
        self.lives[worker] = Life(str(self.epochs))
        slot = self.index.slot_of(worker)
        assert self.index.join(worker, str(self.epochs)) == self.index.join(worker, str(self.epochs))
        assert slot is None or self.index.slot_of(worker) == slot

    @rule(worker=workers)
    def leave(self, worker: WorkerId) -> None:
        self.lives.pop(worker, None)
        self.index.leave(worker)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), change=changes, skipped=st.sampled_from([-1, 0, 0, 0, 0, 1]))
    def tell(self, data: st.DataObject, change: CacheChanges, skipped: int) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives[worker]
        sequence = max(0, (life.sequence or 0) + 1 + skipped)
        applied = self.index.apply(worker, CacheEvents.of(life.epoch, sequence, change))
        if life.sequence is not None and sequence <= life.sequence:
            assert applied is Applied.DUPLICATE
            return
        life.change(change)
        if life.sequence is not None and sequence == life.sequence + 1:
            assert applied is Applied.APPLIED
            life.sequence = sequence
        else:
            assert applied is Applied.GAP
            life.doubts.add(Doubt.EVENTS_MISSING)

    @rule(worker=workers, change=changes)
    def tell_of_another_life(self, worker: WorkerId, change: CacheChanges) -> None:
        assert self.index.apply(worker, CacheEvents.of("none", 1, change)) is Applied.FOREIGN

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), blocks=by_tier, ahead=st.integers(0, 3), meanwhile=changes)
    def restore(
        self, data: st.DataObject, blocks: dict[Tier, tuple[BlockHash, ...]], ahead: int, meanwhile: CacheChanges
    ) -> None:
        """And a batch comes while the snapshot does."""
        worker = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives[worker]
        sequence = (life.sequence or 0) + ahead
        restoration = self.index.begin_restore(worker, life.epoch)
        self.index.apply(worker, CacheEvents.of(life.epoch, sequence, meanwhile))
        for tier, names in blocks.items():
            restoration.add(tier, b"".join(names))
        assert restoration.finish(sequence)
        life.sequence, life.held, life.expected = sequence, {}, set()
        life.change(CacheChanges(blocks))
        life.doubts -= {Doubt.NO_SNAPSHOT, Doubt.EVENTS_MISSING}
        for sent in self.sent:
            if life in sent.lives and sent.since_s + EXPECT_S > self.clock.now_s:
                life.expect(sent.blocks)

    @rule(
        places=st.lists(workers, unique=True, min_size=1, max_size=2),
        chain=st.sampled_from(CHAINS),
        length=st.integers(1, 6),
    )
    def send(self, places: list[WorkerId], chain: list[BlockHash], length: int) -> None:
        self.index.expect(places, chain[:length])
        lives = [self.lives[worker] for worker in places if worker in self.lives]
        for life in lives:
            life.expect(chain[:length])
        if lives:
            self.sent.append(Sent(self.clock.now_s, self.clock.now_s + EXPECT_S, lives, chain[:length]))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), is_away=st.booleans())
    def redis(self, data: st.DataObject, is_away: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lives)))
        if is_away:
            self.index.doubt(worker, Doubt.REDIS_AWAY)
            self.lives[worker].doubts.add(Doubt.REDIS_AWAY)
        else:
            self.index.trust(worker, Doubt.REDIS_AWAY)
            self.lives[worker].doubts.discard(Doubt.REDIS_AWAY)

    @rule(seconds=st.sampled_from([1.0, EXPECT_S / 2, EXPECT_S]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        while self.index.tidy():
            pass
        here = list(self.lives.values())
        for sent in [sent for sent in self.sent if sent.due_s <= self.clock.now_s]:
            self.sent.remove(sent)
            stale = [life for life in sent.lives if life in here and life.doubts]
            if stale:
                self.sent.append(Sent(sent.since_s, self.clock.now_s + EXPECT_S, stale, sent.blocks))
            for life in sent.lives:
                if life not in stale:
                    life.expected -= set(sent.blocks)

    @rule(slices=st.integers(1, 300))
    def tidy_a_little(self, slices: int) -> None:
        for _ in range(slices):
            self.index.tidy()

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        slots = {worker: self.index.slot_of(worker) for worker in self.lives}
        for chain in CHAINS:
            expected = {slots[worker]: life.prefix(chain) for worker, life in self.lives.items()}
            assert self.index.match(list(chain)) == {slot: length for slot, length in expected.items() if length.total}
        assert {worker: set(each.doubts) for worker, each in self.index.stale().items()} == {
            worker: life.doubts for worker, life in self.lives.items() if life.doubts
        }
        known = {block for life in self.lives.values() for block in (*life.held, *life.expected)}
        assert len(self.index._table.states()) == len(known)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
