"""What each router has given each tenant, told to all others, so that fair shares hold across routers.

Each router writes the totals since its start again and again; the others take the difference to what they read
before. So nothing is lost while Redis is away, and nothing counts twice.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

from baton.cluster.lease import Lease
from baton.cluster.records import Announcement, RecordKind, Watch

SHARES_LEASE = Lease(heartbeat_s=0.5, expiry_s=5.0, poll_s=0.5)
ABSENT_MAX = 64
"""Routers that are not there now, whose totals are remembered in case that they come back."""


class Share(NamedTuple):
    """What tenants have fair shares in."""

    model: str
    request_class: str
    tenant: str


class ServedTokens(BaseModel):
    """One router's record."""

    model_config = ConfigDict(frozen=True)

    router_id: str
    epoch: str
    """Drawn at each start."""
    served: tuple[tuple[Share, int], ...] = ()
    """Tokens since its start; less where what was given turned out not to be used."""
    requests: dict[str, int] = {}
    """In flight, by tenant; only those with any."""


SERVED_TOKENS = RecordKind("share", ServedTokens, lambda record: record.router_id)


class ServedElsewhere:
    """Turns the others' totals into what they have given since the last time."""

    def __init__(self, own_id: str) -> None:
        self._own_id = own_id
        self._seen: dict[tuple[str, str], Mapping[Share, int]] = {}
        """By router and epoch, the last to be seen last."""

    def news(self, records: Iterable[ServedTokens]) -> Mapping[Share, int]:
        """Of all other routers together; what a router gave before it was first seen is not counted."""
        given: Counter[Share] = Counter()
        others = [record for record in records if record.router_id != self._own_id]
        for record in others:
            totals = dict(record.served)
            before = self._seen.pop((record.router_id, record.epoch), None)
            if before is not None:
                given.update({share: total - before.get(share, 0) for share, total in totals.items()})
            self._seen[record.router_id, record.epoch] = totals
        for _ in range(len(self._seen) - len(others) - ABSENT_MAX):
            del self._seen[next(iter(self._seen))]
        return {share: tokens for share, tokens in given.items() if tokens}


class SharesAnnouncement(Announcement[ServedTokens]):
    """One router's totals; `describe_self` gives them as of now."""

    def __init__(
        self, redis: Redis, key_prefix: str, describe_self: Callable[[], ServedTokens], lease: Lease = SHARES_LEASE
    ) -> None:
        super().__init__(redis, key_prefix, SERVED_TOKENS, describe_self, lease)


class SharesWatch(Watch[ServedTokens]):
    """All routers' totals as Redis last told them."""

    def __init__(self, redis: Redis, key_prefix: str, lease: Lease = SHARES_LEASE) -> None:
        super().__init__(redis, key_prefix, SERVED_TOKENS, lease)
