"""Workers race for the same blocks; all 10,000 times: `python -m tests.kvcache.directory.directory_world 10000`."""

from baton.cluster.redis_server import EmbeddedRedis
from tests.kvcache.directory.directory_redis import plain_client
from tests.kvcache.directory.directory_world import run

INTERLEAVINGS = 1000


def test_the_directory_names_nothing_that_is_gone_for_longer_than_a_lease() -> None:
    with EmbeddedRedis() as server, plain_client(server) as client:
        run(client, range(INTERLEAVINGS))
