"""A connection to the cluster's Redis, checked before it is used."""

import os
import re

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from baton.errors import ClusterError, SettingsError

TIMEOUT_S = 1.0
"""For connecting, and again for each answer. Callers retry, so the client itself never does."""

REASONS = (
    ((redis.exceptions.TimeoutError, TimeoutError), f"it did not answer within {TIMEOUT_S:g} s"),
    (redis.exceptions.AuthenticationError, "it refuses the user name or password"),
    ((redis.exceptions.InvalidResponse, ValueError), "what answers there is not Redis"),
)


async def connect_redis(url: str) -> Redis:
    """A client that has had an answer; the caller closes it (`aclose`).

    Raises SettingsError if the URL is none of Redis's, ClusterError within about two seconds if nobody
    answers there, or somebody who is no Redis.
    """
    client = redis_client(url)
    try:
        await client.ping()
    except (RedisError, OSError, ValueError) as error:  # ValueError: an answer that is not Redis's protocol
        await client.aclose()
        reason = describe(error)
        raise ClusterError(f"Redis at {without_password(url)} cannot be used: {reason}.") from None
    return client


def redis_client(url: str) -> Redis:
    """A client that connects when first used; replies are `str`. Raises SettingsError as `connect_redis` does."""
    try:
        return Redis.from_url(
            url,
            decode_responses=True,
            socket_connect_timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:
        raise SettingsError(
            f"{without_password(url)} is not a Redis URL: it should look like redis://HOST:PORT/0."
        ) from None


def without_password(url: str) -> str:
    """The URL fit for logs and messages."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def describe(error: Exception) -> str:
    """Why Redis failed us, on one line."""
    for kind, reason in REASONS:
        if isinstance(error, kind):
            return reason
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
