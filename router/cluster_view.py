"""What this router knows of the workers and the other routers, kept up to date; and what it tells the others."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from redis.asyncio import Redis

from baton.clock import Clock, monotonic
from baton.cluster.cache_reader import CacheEventReader
from baton.cluster.router_info import RouterInfo
from baton.cluster.routers import RouterAnnouncement, RouterWatch
from baton.cluster.worker_info import WorkerInfo
from baton.ids import WorkerId
from baton.settings import RouterSettings
from router.cooldown import Cooldowns
from router.index.feed import IndexFeed
from router.index.prefix_index import PrefixIndex
from router.index.snapshots import GrpcSnapshots
from router.placement.placer import Placer
from router.worker_pool import Membership, WorkerPool

log = logging.getLogger(__name__)

WARM_TIMEOUT_S = 30.0
"""How long a new router waits for the workers' snapshots before it serves without them."""
PEERS_LOOK_S = 1.0
"""Between two looks at the other routers' load, at most: it expires even if nobody tells."""


class ClusterView:
    """Everything that placement is made with, of all models. Lives on the loop; membership and Redis client stay the
    caller's. Without Redis there are neither KV events nor other routers: the index then knows what this router
    itself sent where, and says so."""

    def __init__(
        self,
        settings: RouterSettings,
        membership: Membership,
        redis: Redis | None,
        router_id: str,
        clock: Clock = monotonic,
    ) -> None:
        self.router_id = router_id
        self.index = PrefixIndex(settings.index_blocks_max, clock)
        self.placer = Placer(self.index, settings.policy, clock, Random())
        self.pool = WorkerPool(membership, clock, on_change=self._use)
        self.cooldowns = Cooldowns(clock)
        self.feed: IndexFeed | None = None
        self.routers: RouterWatch | None = None
        self.is_warm = False
        self._membership, self._redis, self._key_prefix = membership, redis, settings.key_prefix
        self._announcement: RouterAnnouncement | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._used: set[WorkerId] = set()
        self._unpaired: Mapping[WorkerId, str] = {}
        if redis is not None:
            events = CacheEventReader(redis, settings.key_prefix)
            self.feed = IndexFeed(self.index, membership, events, GrpcSnapshots(), clock)
            self.routers = RouterWatch(redis, settings.key_prefix, router_id, clock=clock)

    async def start(self, grpc_address: str, http_address: str) -> None:
        """Returns when the other routers know this one, at these addresses; it is warm somewhat later.

        Raises ClusterError if Redis does not answer; `close` is then still due.
        """
        await self.pool.start()
        if self._redis is None or self.feed is None or self.routers is None:
            self.is_warm = True
            return
        await self.feed.start()
        await self.routers.start()

        def describe() -> RouterInfo:
            return RouterInfo(
                router_id=self.router_id,
                grpc_address=grpc_address,
                http_address=http_address,
                placed=self.placer.placed(),
            )

        self._announcement = RouterAnnouncement(self._redis, self._key_prefix, describe)
        await self._announcement.start()
        self._tasks = [
            asyncio.create_task(self._warm_up(self.feed), name="warm up"),
            asyncio.create_task(self._follow_routers(self.routers), name="follow routers"),
        ]

    async def close(self) -> None:
        """Idempotent. What is still in flight breaks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.stop()
        for part in (self._announcement, self.routers, self.feed):
            if part is not None:
                await part.close()

    # ---- what the doors ask

    def members(self) -> Sequence[WorkerInfo]:
        return self.pool.members

    def peers(self) -> Sequence[RouterInfo]:
        """The other routers."""
        return () if self.routers is None else self.routers.peers()

    def unready(self) -> str | None:
        """Why requests should rather go to another router now, as the end of a sentence."""
        return None if self.is_warm else "this router is still learning which KV blocks lie where"

    def health(self) -> Mapping[str, Any]:
        placed = {} if self.routers is None else self.routers.placed()
        return {
            "router": self.router_id,
            "warm": self.is_warm,
            "index": self._index_health(),
            "redis_away": self.routers is not None and self.routers.is_stale,
            "routers": [
                {
                    "router": peer.router_id,
                    "http_address": peer.http_address,
                    "grpc_address": peer.grpc_address,
                    "load_is_known": peer.router_id in placed,
                }
                for peer in self.peers()
            ],
            "unpaired": dict(self._unpaired),
            "cooling_down": {worker_id: round(left, 3) for worker_id, left in self.cooldowns.cooling().items()},
        }

    def _index_health(self) -> Mapping[str, Any]:
        if self.feed is not None:
            return self.feed.health()
        return {"fresh": False, "reason": "no KV events: it knows what this router itself sent where"}

    # ---- what changes

    def _use(self, usable: Sequence[WorkerInfo]) -> None:
        self.placer.set_workers(usable)
        self._tell_unpaired(self.placer.unpaired)
        if self.feed is None:
            members = {worker.worker_id for worker in self._membership.workers()}
            for worker_id in self._used - members:
                self.index.leave(worker_id)
            self._used = members
            self.index.tidy()

    def _tell_unpaired(self, unpaired: Mapping[WorkerId, str]) -> None:
        for worker_id in unpaired.keys() - self._unpaired.keys():
            log.warning("%s gets no prompts: %s", worker_id, unpaired[worker_id])
        self._unpaired = unpaired

    async def _warm_up(self, feed: IndexFeed) -> None:
        if not await feed.warm(WARM_TIMEOUT_S):
            log.warning("some workers gave no snapshot of their cache within %g s; serving without", WARM_TIMEOUT_S)
        self.is_warm = True
        self.pool.refresh()

    async def _follow_routers(self, routers: RouterWatch) -> None:
        while True:
            self.placer.set_peers(routers.placed())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PEERS_LOOK_S):
                    await routers.changed()
