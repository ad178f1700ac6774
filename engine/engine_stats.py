"""An engine's numbers, from those who count."""

from engine.interface import EngineStats
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler


def stats_of(scheduler: Scheduler, cache: PrefixCache, steps: int) -> EngineStats:
    pool = scheduler.pool
    return EngineStats(
        running_sequences=len(scheduler.running),
        waiting_sequences=len(scheduler.waiting) + len(scheduler.reserved),
        waiting_tokens=scheduler.waiting_tokens,
        waiting_token_context=scheduler.waiting_token_context,
        kv_tokens=scheduler.kv_tokens,
        kv_blocks_total=pool.total,
        kv_blocks_used=pool.used,
        kv_blocks_wanted=scheduler.kv_blocks_wanted,
        kv_blocks_cached=pool.cached,
        prefix_queries_tokens=scheduler.prefix_queries_tokens,
        prefix_hits_tokens=scheduler.prefix_hits_tokens,
        preemptions=scheduler.preemptions,
        steps=steps,
        tier_hits_tokens=dict(cache.hits_tokens),
        recomputed_tokens=scheduler.recomputed_tokens,
    )
