"""bench.directory: what it fills, its figures, and what it extrapolates."""

import redis

from baton.cluster.redis_server import EmbeddedRedis
from bench.directory import Memory, compare_buckets, extrapolate, fits, index_table, measure, memory_table, speed_table
from bench.tier_index import measure_index
from bench.wide import wide_console
from kvcache.directory.scripts import BUCKET_DIGITS, NAMES_MAX


def test_directories_are_filled_and_measured() -> None:
    made: list[int] = []
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        results = measure(client, [NAMES_MAX, 3000], made.append)
        compare_buckets(client, 3000, results, made.append)
    assert [(m.blocks, m.holders, m.buckets) for m in results.memory] == [
        *((NAMES_MAX, 1, 65_536), (NAMES_MAX, 3, 65_536), (3000, 1, 65_536), (3000, 3, 65_536)),
        *((3000, 1, 4096), (3000, 1, 16**5)),
    ]
    assert all(20 < m.bytes_per_block < 1000 and m.is_measured for m in results.memory)
    few, many = results.memory[-2:]
    assert few.bytes_per_block < many.bytes_per_block, "fewer buckets"
    assert len(made) == (3 + 1) * (1 + 6) + 2 * 6
    assert all(0 < speed.p50_s <= speed.p99_s for speed in results.speed)
    results.index.append(measure_index(1000))
    assert index_table(results.index).row_count == 1 and results.index[0].bytes_per_block < 200
    wide_console().print(memory_table(results.memory), speed_table(results.speed), index_table(results.index))


def test_what_does_not_fit_is_extrapolated_and_said_to_be() -> None:
    buckets = 16**BUCKET_DIGITS
    measured = [
        Memory(blocks, holders, buckets, 0.0, 1000 + 20 * holders * blocks)
        for blocks in (10, 100, 1000)
        for holders in (1, 3)
    ]
    assert extrapolate([*measured, Memory(1000, 1, 16, 0.0, 9)], 10_000) == [
        Memory(10_000, 1, buckets, 20.1, 201_000, is_measured=False),
        Memory(10_000, 3, buckets, 60.1, 601_000, is_measured=False),
    ]
    assert fits(1000) and not fits(10**12)
