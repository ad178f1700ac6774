"""What the workers' caches hold, and clearing them: asked of each worker, now."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc.aio

from baton.cluster.worker_info import WorkerInfo
from baton.latency import TIERS, Tier
from baton.rpc import events_pb2, worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS

STATUS_TIMEOUT_S = 2.0
CLEAR_TIMEOUT_S = 10.0
"""A tier on a disk may have many slots to erase."""
TOP_PREFIXES_MAX = 100
_TIERS: Mapping[int, Tier] = {events_pb2.TIER_HBM: "hbm", events_pb2.TIER_DDR: "ddr", events_pb2.TIER_SSD: "ssd"}
_TIER_FIELDS = (
    *("blocks", "blocks_max", "bytes", "bytes_max", "hit_tokens", "retained_bytes", "off_reason"),
    *("restore_latency_s", "restore_bytes_per_s"),
)
_COUNTS = ("queried_tokens", "fetched_tokens", "dropped_blocks", "corrupt_blocks")
Json = dict[str, Any]


async def cache_status(workers: Sequence[WorkerInfo], top_prefixes: int) -> Json:
    """Every worker's tiers, and the cluster's sums, within STATUS_TIMEOUT_S. Of a worker that does not answer there is
    the reason alone. A prefix that several workers hold is one, with the uses of all."""
    request = worker_pb2.GetCacheStatusRequest(top_prefixes=min(top_prefixes, TOP_PREFIXES_MAX))

    async def ask(worker: WorkerInfo) -> tuple[Json, worker_pb2.CacheStatus | None]:
        reply, error = await _call(worker, "GetCacheStatus", request, STATUS_TIMEOUT_S)
        return _worker(worker, reply, error), reply

    answers = await asyncio.gather(*map(ask, workers))
    statuses = [reply for _, reply in answers if reply is not None]
    return {
        "object": "cache",
        "workers": [described for described, _ in answers],
        **_sums(statuses),
        "top_prefixes": _top_prefixes(statuses, top_prefixes),
    }


async def clear_caches(workers: Sequence[WorkerInfo], tenant: str) -> Json:
    """What each worker forgot of the tenant's blocks (empty: of everybody's), within CLEAR_TIMEOUT_S."""
    request = worker_pb2.ClearCacheRequest(tenant=tenant)

    async def ask(worker: WorkerInfo) -> Json:
        reply, error = await _call(worker, "ClearCache", request, CLEAR_TIMEOUT_S)
        freed = {"blocks": reply.blocks, "bytes": reply.bytes} if reply is not None else {"blocks": 0, "bytes": 0}
        return {"worker_id": worker.worker_id, "reachable": error is None, "error": error, **freed}

    answers = await asyncio.gather(*map(ask, workers))
    totals = {name: sum(answer[name] for answer in answers) for name in ("blocks", "bytes")}
    return {"object": "cache.clear", "tenant": tenant or None, **totals, "workers": list(answers)}


async def _call(worker: WorkerInfo, method: str, request: object, timeout_s: float) -> tuple[Any | None, str | None]:
    """The answer, or why there is none."""
    try:
        async with grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS) as channel:
            call = getattr(worker_pb2_grpc.WorkerStub(channel), method)
            return await call(request, timeout=timeout_s), None
    except grpc.aio.AioRpcError as error:
        return None, f"{method} failed: {error.code().name}"


def _worker(worker: WorkerInfo, status: worker_pb2.CacheStatus | None, error: str | None) -> Json:
    known = {"worker_id": worker.worker_id, "role": worker.role, "model": worker.model, "error": error}
    if status is None:
        return {**known, "reachable": False, "tiers": []}
    counts = {name: getattr(status, name) for name in _COUNTS}
    return {**known, "reachable": True, **counts, "tiers": list(map(_tier, status.tiers))}


def _tier(tier: worker_pb2.TierStatus) -> Json:
    return {"tier": _name(tier.tier), **{name: getattr(tier, name) for name in _TIER_FIELDS}}


def _name(tier: int) -> str:
    return _TIERS.get(tier, "unknown")


# ---- the cluster's sums


def _sums(statuses: Iterable[worker_pb2.CacheStatus]) -> Json:
    """Hits are what was found where, among the prompt tokens that were looked up; `peer` is what was fetched."""
    counts, hits = dict.fromkeys(_COUNTS, 0), dict.fromkeys((*TIERS, "peer"), 0)
    for status in statuses:
        for name in _COUNTS:
            counts[name] += getattr(status, name)
        hits["peer"] += status.fetched_tokens
        for tier in status.tiers:
            if (found := _TIERS.get(tier.tier)) is not None:
                hits[found] += tier.hit_tokens
    rates = {
        tier: tokens / counts["queried_tokens"] if counts["queried_tokens"] else 0.0 for tier, tokens in hits.items()
    }
    return {**counts, "hit_tokens": hits, "hit_rates": rates}


def _top_prefixes(statuses: Iterable[worker_pb2.CacheStatus], count: int) -> list[Json]:
    """The most reused first; `tier` is the highest that one of its holders has it in."""
    merged: dict[bytes, Json] = {}
    for status in statuses:
        for prefix in status.top_prefixes:
            tier = _name(prefix.tier)
            found = merged.setdefault(
                prefix.block_hash,
                {"hash": prefix.block_hash.hex(), "tokens": prefix.tokens, "uses": 0, "tier": tier, "workers": []},
            )
            found["uses"] += prefix.uses
            found["tier"] = min(found["tier"], tier, key=_height)
            found["workers"].append(status.worker_id)
    return sorted(merged.values(), key=lambda prefix: (-prefix["uses"], -prefix["tokens"]))[:count]


def _height(tier: str) -> int:
    names: Sequence[str] = TIERS
    return names.index(tier) if tier in names else len(names)
