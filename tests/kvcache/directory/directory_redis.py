"""The directory's scripts on a real Redis, called by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import redis

from baton.cluster.redis_server import EmbeddedRedis
from baton.ids import BlockHash
from kvcache.directory.calls import Call


def block(number: int) -> BlockHash:
    return BlockHash(sha256(str(number).encode()).digest()[:16])


def blocks(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(map(block, numbers))


@contextmanager
def plain_client(server: EmbeddedRedis) -> Iterator["redis.Redis"]:
    client = redis.Redis.from_url(server.url)
    try:
        yield client
    finally:
        client.close()


def carry_out(client: "redis.Redis", calls: Sequence[Call]) -> list[Any]:
    """Their answers, errors among them."""
    pipeline = client.pipeline(transaction=False)
    for call in calls:
        pipeline.execute_command("EVALSHA", call.script.sha, 1, call.key, *call.arguments)
    answers = pipeline.execute(raise_on_error=False)
    if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
        for call in calls:
            client.script_load(call.script.source)
        return carry_out(client, calls)
    return answers
