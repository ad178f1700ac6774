"""What operators see of a worker's cache, and how they clear it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton.ids import WorkerId, tenant_tag
from baton.latency import Tier, WorkerLatency
from baton.rpc import events_pb2, worker_pb2
from engine.interface import Engine, EngineStats
from engine.thread import EngineThread
from kvcache.tiers.interface import HotPrefix, TierState

E = TypeVar("E", bound=Engine)
TOP_PREFIXES_MAX = 1000
_TIERS: Mapping[Tier, events_pb2.Tier] = {
    "hbm": events_pb2.TIER_HBM,
    "ddr": events_pb2.TIER_DDR,
    "ssd": events_pb2.TIER_SSD,
}


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Of one moment."""

    stats: EngineStats
    tiers: Sequence[TierState]
    """HBM first."""
    hottest: Sequence[HotPrefix] = ()
    dropped_blocks: int = 0
    corrupt_blocks: int = 0


def report_of(engine: Engine, prefixes: int = 0) -> CacheReport:
    """On the engine's thread."""
    stats, block_bytes = engine.stats(), engine.model.layout.block_bytes
    occupied = stats.kv_blocks_used + stats.kv_blocks_cached
    total = stats.kv_blocks_total
    hbm = TierState("hbm", occupied, total, occupied * block_bytes, total * block_bytes)
    tiers = engine.tiers
    if tiers is None:
        return CacheReport(stats, (hbm,))
    hottest = tiers.hottest(prefixes) if prefixes else ()
    return CacheReport(stats, (hbm, *tiers.states()), hottest, tiers.dropped_blocks, tiers.corrupt_blocks)


class CacheAdmin(Generic[E]):
    """On the loop; asks the engine on its thread. Both raise Overloaded if too much waits for that, Unavailable if it
    is gone."""

    def __init__(
        self,
        worker_id: WorkerId,
        engine: EngineThread[E],
        latency: Callable[[], WorkerLatency],
        fetched_tokens: Callable[[], int],
    ) -> None:
        self._worker_id, self._engine = worker_id, engine
        self._latency, self._fetched_tokens = latency, fetched_tokens

    async def status(self, top_prefixes: int) -> worker_pb2.CacheStatus:
        prefixes = min(top_prefixes, TOP_PREFIXES_MAX)
        report = await self._engine.call(lambda engine: report_of(engine, prefixes))
        return worker_pb2.CacheStatus(
            worker_id=self._worker_id,
            tiers=[self._tier_status(state, report.stats) for state in report.tiers],
            queried_tokens=report.stats.prefix_queries_tokens,
            fetched_tokens=self._fetched_tokens(),
            dropped_blocks=report.dropped_blocks,
            corrupt_blocks=report.corrupt_blocks,
            top_prefixes=map(self._prefix_status, report.hottest),
        )

    async def clear(self, tenant: str) -> worker_pb2.ClearCacheResponse:
        """Empty: everybody's."""
        tag = tenant_tag(tenant) if tenant else None
        blocks, size_bytes = await self._engine.call(lambda engine: engine.clear_cache(tag))
        return worker_pb2.ClearCacheResponse(blocks=blocks, bytes=size_bytes)

    def _tier_status(self, state: TierState, stats: EngineStats) -> worker_pb2.TierStatus:
        restore = self._latency().restore.get(state.tier)
        return worker_pb2.TierStatus(
            tier=_TIERS[state.tier],
            blocks=state.blocks,
            blocks_max=state.blocks_max,
            bytes=state.size_bytes,
            bytes_max=state.size_bytes_max,
            hit_tokens=hit_tokens(stats, state.tier),
            retained_bytes=state.retained_bytes,
            off_reason=state.off_reason,
            restore_latency_s=restore.latency_s if restore else 0.0,
            restore_bytes_per_s=restore.bytes_per_s if restore else 0.0,
        )

    def _prefix_status(self, prefix: HotPrefix) -> worker_pb2.PrefixStatus:
        tokens = (prefix.depth + 1) * self._engine.model.layout.block_tokens
        return worker_pb2.PrefixStatus(
            block_hash=prefix.name, tokens=tokens, uses=prefix.uses, tier=_TIERS[prefix.tier]
        )


def hit_tokens(stats: EngineStats, tier: Tier) -> int:
    """An engine without tiers finds everything in HBM."""
    if not stats.tier_hits_tokens:
        return stats.prefix_hits_tokens if tier == "hbm" else 0
    return stats.tier_hits_tokens.get(tier, 0)
