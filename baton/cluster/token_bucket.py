"""Token rates that all routers agree on: one bucket for each tenant, in Redis, changed by one script only.

A bucket gains a tenant's tokens a minute and holds its burst at most. Who takes must find in it what it takes, or find
it full: so over any time of t minutes at most `rate·t + burst` tokens are taken, and what one request takes beyond a
whole burst. Requests take what they are expected to use and settle the difference at their end; it may leave the bucket
in debt, and is as often the other way.

While Redis is away each router takes from buckets of its own, at its share of the rate, and lays what was taken on
the shared ones when Redis is back. An answer that is lost on its way may charge a request twice.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton.clock import Clock, monotonic
from baton.cluster.lease import Lease, Repeater
from baton.cluster.redis_client import describe

log = logging.getLogger(__name__)

UNITS = 60_000
"""In a token: a rate in tokens a minute is so many units a millisecond, and all arithmetic is in whole numbers."""
TAKE_TIMEOUT_S = 0.25
"""For Redis's answer to a waiting request; past it Redis counts as away. (Closing the connection then takes the client
another second now and then, of the one request whose it was.)"""
SETTLE_S = 1.0
TAKES_MAX = 16
"""At Redis at a time; others wait for them, within the time-out."""
TAKE = """
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local taken, owed = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local level = burst
local known = redis.call('HMGET', KEYS[1], 'level', 'at_ms')
if known[1] then
  level = math.min(burst, tonumber(known[1]) + math.max(0, now_ms - tonumber(known[2])) * rate)
end
level = math.min(burst, level - owed)
local missing_ms = math.ceil(math.max(0, math.min(taken, burst) - level) / rate)
if missing_ms == 0 then level = level - taken end
local full_ms = math.ceil((burst - level) / rate)
redis.call('HSET', KEYS[1], 'level', string.format('%.0f', level), 'at_ms', string.format('%.0f', now_ms))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', full_ms + 1000))
return {missing_ms, level}
"""
"""All in units. A bucket that is not there is full. Numbers are written out, since Redis 7 makes `1e+08` of some."""


@dataclass(frozen=True, slots=True)
class Rate:
    tokens_per_minute: int
    """1 to 10^9."""
    burst_tokens: int
    """1 to 10^9."""

    @property
    def burst(self) -> int:
        """In units."""
        return self.burst_tokens * UNITS

    def share(self, routers: int) -> "Rate":
        """One router's."""
        return Rate(max(1, self.tokens_per_minute // routers), max(1, self.burst_tokens // routers))


@dataclass(frozen=True, slots=True)
class Bucket:
    """The same as in Redis, on a router's own clock."""

    level: int
    """In units; negative: in debt."""
    at_ms: int

    def at(self, now_ms: int, rate: Rate) -> "Bucket":
        gained = max(0, now_ms - self.at_ms) * rate.tokens_per_minute
        return Bucket(min(rate.burst, self.level + gained), now_ms)

    def missing_ms(self, tokens: int, rate: Rate) -> int:
        """Until it holds so much, or is full."""
        missing = min(tokens * UNITS, rate.burst) - self.level
        return max(0, -(-missing // rate.tokens_per_minute))

    def less(self, tokens: int) -> "Bucket":
        return replace(self, level=self.level - tokens * UNITS)


@dataclass(slots=True)
class _Account:
    """What one router knows of one tenant's bucket."""

    rate: Rate
    seen: Bucket
    """As Redis last told, on the router's clock."""
    owed_tokens: int = 0
    """Used and not yet taken from the shared bucket; negative: to be given back."""
    own: Bucket | None = None
    """While Redis is away."""


class TokenBuckets:
    """One router's hold on them. The client stays the caller's.

    `routers` says among how many a rate is shared while Redis is away; `tell_local` is told when that begins and ends.
    """

    def __init__(
        self,
        redis: Redis,
        key_prefix: str,
        routers: Callable[[], int],
        tell_local: Callable[[bool], None],
        clock: Clock = monotonic,
        lease: Lease | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._redis, self._key_prefix = redis, key_prefix
        self._routers, self._tell_local, self._clock = routers, tell_local, clock
        self._script = redis.register_script(TAKE)
        self._accounts: dict[str, _Account] = {}
        self._at_redis = asyncio.Semaphore(TAKES_MAX)
        self._settling = Repeater(self._settle_all, settle_s, lease or Lease(), "Settling tenants' tokens")
        self.is_local = False
        """Whether Redis is away, so that this router limits by its share."""

    def start(self) -> None:
        self._settling.start()

    async def close(self) -> None:
        """Idempotent. Settles what is owed, if Redis is there."""
        await self._settling.close()
        with contextlib.suppress(RedisError, OSError):
            await self._settle_all()

    async def take(self, tenant: str, rate: Rate, tokens: int) -> float:
        """0: they are taken; else nothing is, and they might be had after so many seconds."""
        account = self._account(tenant, rate)
        if not self.is_local:
            try:
                async with asyncio.timeout(TAKE_TIMEOUT_S), self._at_redis:
                    return await self._take_shared(tenant, account, tokens) / 1000
            except (RedisError, OSError) as error:  # TimeoutError is an OSError
                self._go_local(error)
        return self._take_own(account, tokens) / 1000

    def settle(self, tenant: str, rate: Rate, tokens: int) -> None:
        """So many more were used than taken; fewer where negative. Redis is told with the next take, or soon."""
        account = self._account(tenant, rate)
        account.owed_tokens += tokens
        if account.own is not None:
            account.own = account.own.less(tokens)

    def _account(self, tenant: str, rate: Rate) -> _Account:
        if (account := self._accounts.get(tenant)) is None:
            account = self._accounts[tenant] = _Account(rate, Bucket(rate.burst, self._now_ms()))
        account.rate = rate
        return account

    async def _take_shared(self, tenant: str, account: _Account, tokens: int) -> int:
        """Milliseconds until they might be had."""
        rate, owed = account.rate, account.owed_tokens
        account.owed_tokens = 0
        try:
            missing_ms, level = await self._script(
                keys=[f"{{{self._key_prefix}}}:tokens:{tenant}"],
                args=[rate.tokens_per_minute, rate.burst, tokens * UNITS, owed * UNITS],
            )
        except BaseException:
            account.owed_tokens += owed
            raise
        account.seen = Bucket(level, self._now_ms())
        return int(missing_ms)

    def _take_own(self, account: _Account, tokens: int) -> int:
        now_ms, routers = self._now_ms(), max(1, self._routers())
        share = account.rate.share(routers)
        if account.own is None:  # its part of what was there when Redis was last heard of
            left = account.seen.at(now_ms, account.rate).less(account.owed_tokens)
            account.own = Bucket(left.level // routers, now_ms)
        account.own = account.own.at(now_ms, share)
        missing_ms = account.own.missing_ms(tokens, share)
        if not missing_ms:
            account.own = account.own.less(tokens)
            account.owed_tokens += tokens
        return missing_ms

    async def _settle_all(self) -> None:
        """Also finds out whether Redis is there."""
        try:
            await self._redis.ping()
            for tenant, account in list(self._accounts.items()):
                if account.owed_tokens:
                    await self._take_shared(tenant, account, 0)
        except (RedisError, OSError) as error:
            self._go_local(error)
            raise
        self._come_back()

    def _go_local(self, error: Exception) -> None:
        if not self.is_local:
            log.warning("Redis does not answer for token rates (%s): this router limits by its share", describe(error))
            self.is_local = True
            self._tell_local(True)

    def _come_back(self) -> None:
        if self.is_local:
            log.info("token rates are shared through Redis again")
            self.is_local = False
            self._tell_local(False)
            for account in self._accounts.values():
                account.own = None

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
