"""What of a prompt need not be computed, in whatever tier it lies: the scheduler's view of pool and lower tiers."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from baton.clock import Clock, monotonic
from baton.ids import BlockHash, BlockId, TenantTag
from baton.latency import Tier
from engine.restoring import NothingRestored, Restoring
from engine.sequence import LiveSequence
from engine.stopwatch import work_of
from kvcache.block_pool import BlockPool
from kvcache.restore_plan import RestoreCosts, plan_restore, runs_of
from kvcache.tiers.interface import LowerTier, LowerTiers, Owner, Restore


class PrefixCache:
    """Without lower tiers it is the pool alone."""

    def __init__(
        self,
        pool: BlockPool,
        block_tokens: int,
        tiers: LowerTiers | None = None,
        costs: Callable[[], RestoreCosts] | None = None,
        layers: int = 1,
        clock: Clock = monotonic,
    ) -> None:
        """`costs` as they are now, where there are lower tiers; `layers`: of the model."""
        assert tiers is None or costs is not None
        self._pool, self._block_tokens = pool, block_tokens
        self._tiers, self._costs, self._layers, self._clock = tiers, costs, layers, clock
        self.restoring: dict[LiveSequence, Restoring] = {}
        """Those whose restore nobody has settled yet."""
        self._begun: list[Restoring] = []
        """Those for peers, too, of which some may have ended."""
        self.hits_tokens: Counter[Tier] = Counter()
        self._tenants: dict[BlockId, TenantTag] = {}
        """Whose each block was that was published last; of published blocks that came from elsewhere it may be
        nobody's."""
        self._coming: Counter[BlockHash] = Counter()
        """How many restores are about to publish each of these."""

    # ---- what there is

    def places(self, names: Sequence[BlockHash]) -> list[Tier]:
        """Where the blocks of the longest run of `names` lie, from the first on: each in the highest tier it is in."""
        if self._tiers is None:
            return ["hbm"] * len(self._pool.match(names).blocks)
        places: list[Tier] = []
        below: Sequence[LowerTier] = ()
        below_from = 0
        for index, name in enumerate(names):
            if self._pool.find(name) is not None:
                places.append("hbm")
                continue
            if index >= below_from + len(below):
                below, below_from = self._tiers.locate(names[index:]), index
                if not below:
                    break
            places.append(below[index - below_from])
        return places

    def take(self, sequence: LiveSequence, names: Sequence[BlockHash], count: int) -> None:
        """Gives a sequence `count` blocks: the first of them with as much of `names` as it is quickest to reuse. What
        of that lies below the pool is on its way up when this returns."""
        places = self.places(names)
        if self._tiers is not None and self._costs is not None:
            plan = plan_restore(runs_of(places), len(sequence.tokens), self._costs(), self._queued_s())
            places = places[: plan.blocks]
            self._tiers.used(names[: len(places)], sequence.owner)
        sequence.published = next((index for index, place in enumerate(places) if place != "hbm"), len(places))
        sequence.blocks = self._lay_out(names, places, count, sequence.published)
        sequence.found = len(places)
        sequence.computed = sequence.found * self._block_tokens
        if sequence.published < sequence.found:
            self._restore_into(sequence, names, places)
        for place, blocks in Counter(places).items():
            self.hits_tokens[place] += blocks * self._block_tokens

    def _lay_out(self, names: Sequence[BlockHash], places: Sequence[Tier], count: int, leading: int) -> list[BlockId]:
        shared = {index: block for index in _in_hbm(places) if (block := self._pool.find(names[index])) is not None}
        self._pool.hold(list(shared.values()))
        fresh = iter(self._pool.allocate(count - len(shared), after=shared[leading - 1] if leading else None))
        return [shared[index] if index in shared else next(fresh) for index in range(count)]

    def _restore_into(self, sequence: LiveSequence, names: Sequence[BlockHash], places: Sequence[Tier]) -> None:
        filled = tuple(index for index, place in enumerate(places) if place != "hbm")
        wanted, blocks = [names[index] for index in filled], [sequence.blocks[index] for index in filled]
        sequence.restoring = self.restoring[sequence] = self.begin(wanted, blocks, filled, places)

    def begin(
        self, names: Sequence[BlockHash], blocks: Sequence[BlockId], filled: tuple[int, ...], places: Sequence[Tier]
    ) -> Restoring:
        """Begins to bring these up, which are the blocks `filled` of a prefix that lies where `places` says."""
        assert self._tiers is not None and self._costs is not None
        costs = self._costs()
        tokens, cached = len(places) * self._block_tokens, filled[0] * self._block_tokens
        expected_s = self._queued_s() + costs.restore_s(Counter(places[index] for index in filled))
        compute_s = costs.compute_s(tokens, cached)
        self._coming.update(names)
        restore = self._restore(names, blocks)
        self._begun.append(Restoring(restore, filled, len(places), self._clock(), expected_s, compute_s, names))
        return self._begun[-1]

    def _queued_s(self) -> float:
        """Until all is up that is on its way, one after the other."""
        self._begun = [restoring for restoring in self._begun if not restoring.is_over]
        return sum(restoring.restore.left_s for restoring in self._begun)

    def _restore(self, names: Sequence[BlockHash], blocks: Sequence[BlockId]) -> Restore:
        """Of what was located before room was made for it, as much as is still there."""
        assert self._tiers is not None
        there = len(self._tiers.locate(names))
        return self._tiers.restore(names[:there], blocks[:there]) if there else NothingRestored(self._layers)

    # ---- what is on its way

    def is_coming(self, names: Sequence[BlockHash]) -> bool:
        """Whether somebody restores some of these already. Who waits for that finds them in HBM: it has begun before,
        and is given up when it turns slow."""
        return bool(self._coming) and any(name in self._coming for name in names)

    def keeps_ahead(self, sequence: LiveSequence, start: int, end: int) -> bool:
        """Whether a step with these tokens of a sequence has to wait for none of its layers."""
        if sequence.restoring is None:
            return True
        assert self._costs is not None
        step_s = self._costs().latency.step_time_s(work_of([(start, end)]))
        return sequence.restoring.keeps_ahead(self._layers, step_s)

    def give_up_slow(self, those: Iterable[Restoring]) -> None:
        now_s = self._clock()
        for restoring in those:
            if not restoring.is_over and restoring.is_too_slow(now_s):
                restoring.restore.cancel()

    def cancel(self, sequence: LiveSequence) -> None:
        """Nothing is written any more into the blocks of a sequence that leaves."""
        if sequence.restoring is not None:
            sequence.restoring.restore.cancel()
            self.forget(sequence)

    def forget(self, sequence: LiveSequence) -> None:
        """Its restore has ended and been seen to."""
        sequence.restoring = None
        self.seen_to(self.restoring.pop(sequence))

    def seen_to(self, restoring: Restoring) -> None:
        """What of it was right is published, or nothing ever will be. Once for each that was begun."""
        if not restoring.is_void:
            self._coming -= Counter(restoring.names)

    def since_s(self, restoring: Restoring) -> float:
        return self._clock() - restoring.began_s

    # ---- what there will be

    def publish(self, sequence: LiveSequence, first: int, end: int) -> None:
        """These blocks of a sequence have their final content."""
        if first >= end:
            return
        names = sequence.block_names()
        self.tell_published(sequence.hasher.root, names[:end], first, sequence.owner)
        for index in range(first, end):
            self.publish_block(sequence.blocks[index], names[index], sequence.owner.tenant)

    def tell_published(self, root: BlockHash, names: Sequence[BlockHash], first: int, owner: Owner) -> None:
        """The blocks `names[first:]` of a prompt are about to be published."""
        if self._tiers is not None:
            self._tiers.published(root, names, first, owner)

    def publish_block(self, block: BlockId, name: BlockHash, tenant: TenantTag | None) -> None:
        """After `tell_published`, or of a block that the lower tiers know already; None: whose it is they know."""
        self._tenants.pop(block, None)
        if tenant is None and self._tiers is not None:
            tenant = self._tiers.tenant_of(name)
        if tenant is not None:
            self._tenants[block] = tenant
        self._pool.publish(block, name)

    def clear(self, tenant: TenantTag | None) -> int:
        """Forgets what the pool has of a tenant, or all; how many blocks. What may be anybody's goes too, and what is
        on its way up stays its sequence's own. Before the lower tiers are cleared."""
        for sequence, restoring in self.restoring.items():
            if tenant in (None, sequence.owner.tenant) or self.is_partly(tenant, restoring.names):
                self.void(restoring)
        published = self._pool.published()
        blocks = [b for b in published if tenant is None or self._tenants.get(b, tenant) == tenant]
        self._pool.forget(blocks)
        return len(blocks)

    def is_partly(self, tenant: TenantTag | None, names: Sequence[BlockHash]) -> bool:
        """Whether some of these blocks in lower tiers may be a tenant's; None: anybody's."""
        if tenant is None or self._tiers is None:
            return True
        return any(self._tiers.tenant_of(name) in (tenant, None) for name in names)

    def void(self, restoring: Restoring) -> None:
        """Nothing of it is to be published."""
        self.seen_to(restoring)
        restoring.is_void = True


def _in_hbm(places: Sequence[Tier]) -> list[int]:
    return [index for index, place in enumerate(places) if place == "hbm"]
