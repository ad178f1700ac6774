"""Which workers are in the cluster: they announce themselves in Redis under a lease, and routers watch."""

from collections.abc import Callable, Sequence

from redis.asyncio import Redis

from baton.clock import Clock, monotonic
from baton.cluster.lease import Lease
from baton.cluster.records import Announcement, RecordKind, Watch
from baton.cluster.worker_info import WorkerInfo

WORKER = RecordKind("worker", WorkerInfo, lambda worker: worker.worker_id)


class Membership(Announcement[WorkerInfo]):
    """One worker's place in the cluster; `describe_worker` gives its record as of now, at every heartbeat."""

    def __init__(
        self, redis: Redis, key_prefix: str, describe_worker: Callable[[], WorkerInfo], lease: Lease | None = None
    ) -> None:
        super().__init__(redis, key_prefix, WORKER, describe_worker, lease or Lease())


class MembershipWatch(Watch[WorkerInfo]):
    """The cluster's workers as Redis last told them."""

    def __init__(self, redis: Redis, key_prefix: str, lease: Lease | None = None, clock: Clock = monotonic) -> None:
        super().__init__(redis, key_prefix, WORKER, lease or Lease(), clock)

    def workers(self) -> Sequence[WorkerInfo]:
        """In the order of their ids; loads differ with every heartbeat."""
        return self.records
