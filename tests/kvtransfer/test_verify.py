"""Blocks against their digests."""

import asyncio
import threading
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.region import HostRegion
from kvtransfer.verify import VERIFICATIONS_MAX, Verifier, VerifyMetrics

LAYOUT = KVLayout(layers=2, blocks=200, block_tokens=4, kv_heads=1, head_dim=2, dtype="float32")
BLOCKS = [BlockId(block) for block in range(100, 0, -1)]


def filled_region() -> HostRegion:
    region = HostRegion.allocate(LAYOUT)
    region.memory[:] = Random(7).randbytes(LAYOUT.region_bytes)
    return region


def verifier(region: Any, policy: Any, registry: CollectorRegistry | None = None) -> Verifier:
    return Verifier(region, policy, VerifyMetrics(registry or CollectorRegistry()), Random(3))


@pytest.mark.parametrize("where", [(0, 0), (1, 1)])
def test_always_finds_one_bit(where: tuple[int, int]) -> None:
    region, registry = filled_region(), CollectorRegistry()
    digests = region.digests(BLOCKS)
    region.writable(*where, BLOCKS[37], 1)[5] ^= 0x10

    async def main() -> list[int]:
        return await verifier(region, "always", registry).mismatches(BLOCKS, digests)

    assert asyncio.run(main()) == [37]
    assert registry.get_sample_value("baton_kv_blocks_verified_total", {"result": "mismatch"}) == 1
    assert registry.get_sample_value("baton_kv_blocks_verified_total", {"result": "match"}) == 99
    region.close()


def test_never_looks_at_nothing_and_sampled_at_some() -> None:
    region, registry = filled_region(), CollectorRegistry()
    wrong = [digest ^ 1 for digest in region.digests(BLOCKS)]

    async def main() -> tuple[list[int], list[int]]:
        never = verifier(region, "never")
        assert not never.wants_digests
        return await never.mismatches(BLOCKS, wrong), await verifier(region, "sampled", registry).mismatches(
            BLOCKS, wrong
        )

    never, sampled = asyncio.run(main())
    assert never == []
    assert 3 <= len(sampled) <= 30
    assert registry.get_sample_value("baton_kv_blocks_verified_total", {"result": "skipped"}) == 100 - len(sampled)
    region.close()


def test_the_loop_goes_on_meanwhile_and_only_so_many_digest_at_a_time() -> None:
    class SlowRegion:
        running = most = 0
        go_on, full = threading.Event(), threading.Event()
        lock = threading.Lock()

        def digests(self, blocks: Sequence[BlockId]) -> list[int]:
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
                if self.running == VERIFICATIONS_MAX:
                    self.full.set()
            assert self.go_on.wait(60)
            with self.lock:
                self.running -= 1
            return [0] * len(blocks)

    async def main() -> int:
        region = SlowRegion()
        slow = verifier(region, "always")
        several = [asyncio.create_task(slow.mismatches(BLOCKS, [0] * len(BLOCKS))) for _ in range(5)]
        await asyncio.to_thread(region.full.wait, 60)
        region.go_on.set()
        assert await asyncio.gather(*several) == [[]] * 5
        return region.most

    assert asyncio.run(main()) == VERIFICATIONS_MAX
