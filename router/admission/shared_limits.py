"""What all routers keep to together, through Redis: tenants' rates, requests in flight, and fair shares."""

import asyncio
from collections.abc import Callable, Mapping

from redis.asyncio import Redis

from baton.clock import Clock, monotonic
from baton.cluster.lease import Lease
from baton.cluster.served_tokens import (
    SHARES_LEASE,
    ServedElsewhere,
    ServedTokens,
    Share,
    SharesAnnouncement,
    SharesWatch,
)
from baton.cluster.token_bucket import Rate, TokenBuckets
from router.admission.tenants import Tenant


class SharedLimits:
    """One router's side of it. The client stays the caller's.

    Others' numbers are a second old at most. While Redis is away rates and requests in flight are limited by this
    router's share, and fair shares hold on each router alone.
    """

    def __init__(
        self,
        redis: Redis,
        key_prefix: str,
        router_id: str,
        epoch: str,
        tell_local: Callable[[bool], None],
        clock: Clock = monotonic,
        lease: Lease = SHARES_LEASE,
    ) -> None:
        """`epoch` is drawn at each start of the process; `tell_local` hears when Redis goes away and comes back."""
        self._redis, self._key_prefix, self._lease = redis, key_prefix, lease
        self._router_id, self._epoch = router_id, epoch
        self._watch = SharesWatch(redis, key_prefix, lease)
        self._buckets = TokenBuckets(redis, key_prefix, self._routers, tell_local, clock, lease)
        self._elsewhere = ServedElsewhere(router_id)
        self._announcement: SharesAnnouncement | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(
        self,
        served: Callable[[], Mapping[Share, int]],
        requests: Callable[[], Mapping[str, int]],
        tell_served_elsewhere: Callable[[Mapping[Share, int]], None],
    ) -> None:
        """`served` and `requests` say what this router has given in all, and has in flight by tenant; what others
        have given since the last time is told. Raises ClusterError if Redis does not answer; `close` is due even so."""

        def describe() -> ServedTokens:
            return ServedTokens(
                router_id=self._router_id,
                epoch=self._epoch,
                served=tuple(served().items()),
                requests={tenant: count for tenant, count in requests().items() if count},
            )

        self._announcement = SharesAnnouncement(self._redis, self._key_prefix, describe, self._lease)
        self._buckets.start()
        await self._announcement.start()
        await self._watch.start()
        self._following = asyncio.create_task(self._follow(tell_served_elsewhere), name="follow fair shares")

    async def close(self) -> None:
        """Idempotent."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._watch.close()
        if self._announcement is not None:
            await self._announcement.close()
        await self._buckets.close()

    async def take(self, tenant: Tenant, tokens: int) -> float:
        return await self._buckets.take(tenant.name, _rate(tenant), tokens)

    def settle(self, tenant: Tenant, tokens: int) -> None:
        self._buckets.settle(tenant.name, _rate(tenant), tokens)

    def requests_elsewhere(self, tenant: Tenant) -> int:
        """As of the others' last word; while Redis is away, all but this router's share of what the tenant may have."""
        if self._watch.is_stale:
            return tenant.requests_max - max(1, tenant.requests_max // self._routers())
        others = (record for record in self._watch.records if record.router_id != self._router_id)
        return sum(record.requests.get(tenant.name, 0) for record in others)

    def _routers(self) -> int:
        return max(1, len(self._watch.records))

    async def _follow(self, tell: Callable[[Mapping[Share, int]], None]) -> None:
        while True:
            if news := self._elsewhere.news(self._watch.records):
                tell(news)
            await self._watch.changed()


def _rate(tenant: Tenant) -> Rate:
    return Rate(tenant.tokens_per_minute, tenant.burst)
