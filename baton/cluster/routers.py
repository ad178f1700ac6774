"""Which routers are in the cluster, and what each has placed on the workers: no leader, all tell all."""

from collections.abc import Callable, Mapping, Sequence

from redis.asyncio import Redis

from baton.clock import Clock, monotonic
from baton.cluster.lease import Lease
from baton.cluster.records import Announcement, RecordKind, Watch
from baton.cluster.router_info import PlacedLoad, RouterInfo
from baton.ids import WorkerId

ROUTER = RecordKind("router", RouterInfo, lambda router: router.router_id)
ROUTER_LEASE = Lease(heartbeat_s=0.25, expiry_s=3.0, poll_s=0.25)
LOAD_EXPIRY_S = 5.0
"""For so long after Redis last answered the others' load counts; it is gone by then, or others know better."""


class RouterAnnouncement(Announcement[RouterInfo]):
    """One router's place in the cluster; `describe_router` gives its record as of now, at every heartbeat."""

    def __init__(
        self,
        redis: Redis,
        key_prefix: str,
        describe_router: Callable[[], RouterInfo],
        lease: Lease = ROUTER_LEASE,
    ) -> None:
        super().__init__(redis, key_prefix, ROUTER, describe_router, lease)


class RouterWatch(Watch[RouterInfo]):
    """The cluster's other routers as Redis last told them."""

    def __init__(
        self, redis: Redis, key_prefix: str, own_id: str, lease: Lease = ROUTER_LEASE, clock: Clock = monotonic
    ) -> None:
        super().__init__(redis, key_prefix, ROUTER, lease, clock)
        self._own_id = own_id

    def peers(self) -> Sequence[RouterInfo]:
        """In the order of their ids."""
        return [router for router in self.records if router.router_id != self._own_id]

    def placed(self) -> Mapping[str, Mapping[WorkerId, PlacedLoad]]:
        """By the other routers that announced themselves within their lease; empty LOAD_EXPIRY_S after Redis left."""
        announced = self.announced_within(LOAD_EXPIRY_S)
        return {router.router_id: router.placed for router in announced if router.router_id != self._own_id}
