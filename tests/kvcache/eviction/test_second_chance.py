"""What the pool in HBM evicts first."""

from collections.abc import Iterator
from itertools import count

from baton.ids import BlockHash, BlockId
from kvcache.block_pool import BlockPool


def names() -> Iterator[BlockHash]:
    return (BlockHash(number.to_bytes(16, "big")) for number in count())


def cache_prompt(pool: BlockPool, fresh: Iterator[BlockHash], blocks: int) -> list[BlockHash]:
    held = pool.allocate(blocks)
    prompt = [next(fresh) for _ in held]
    for block, name in zip(held, prompt, strict=True):
        pool.publish(block, name)
    pool.release(held)
    return prompt


def use_again(pool: BlockPool, prompt: list[BlockHash], *, is_used: bool = True) -> int:
    blocks: tuple[BlockId, ...] = pool.match(prompt).blocks
    pool.hold(blocks)
    pool.release(blocks, is_used=is_used)
    return len(blocks)


def test_a_scan_does_not_push_out_what_is_used_again() -> None:
    pool, fresh = BlockPool(64), names()
    system_prompt = cache_prompt(pool, fresh, 8)
    for _ in range(100):
        assert use_again(pool, system_prompt) == 8
        cache_prompt(pool, fresh, 20)
        pool.check_integrity()


def test_what_is_not_used_again_goes_in_the_end() -> None:
    pool, fresh = BlockPool(64), names()
    prompt = cache_prompt(pool, fresh, 8)
    assert use_again(pool, prompt) == 8
    for _ in range(20):
        cache_prompt(pool, fresh, 20)
    assert not pool.match(prompt).blocks


def test_to_be_copied_down_is_no_use() -> None:
    pool, fresh = BlockPool(32), names()
    looked_at, used = cache_prompt(pool, fresh, 8), cache_prompt(pool, fresh, 8)
    for _ in range(3):
        use_again(pool, looked_at, is_used=False)
        use_again(pool, used)
    cache_prompt(pool, fresh, 20)
    assert len(pool.match(looked_at).blocks) < 8
    assert len(pool.match(used).blocks) == 8


def test_two_holders_at_once_are_two_uses() -> None:
    pool, fresh = BlockPool(32), names()
    held = pool.allocate(8)
    shared = [next(fresh) for _ in held]
    for block, name in zip(held, shared, strict=True):
        pool.publish(block, name)
    pool.hold(held)
    pool.release(held)
    pool.release(held)
    once = cache_prompt(pool, fresh, 8)
    cache_prompt(pool, fresh, 20)
    assert len(pool.match(shared).blocks) == 8
    assert len(pool.match(once).blocks) < 8
