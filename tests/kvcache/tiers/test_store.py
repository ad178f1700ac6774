"""What a store decides, over an I/O that ends when it is told to."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from baton.ids import BlockHash
from kvcache.eviction.policy import make_policy
from kvcache.tiers.interface import LowerTier, Owner
from kvcache.tiers.moves.offloads import BATCH
from tests.kvcache.tiers.fake_io import FakeRestore, content_of
from tests.kvcache.tiers.store_world import DISK_ERROR, ROOT, ROW_BYTES, TENANTS, World, chain

PLENTY = 1000 * ROW_BYTES


def fill(world: World, numbers: Sequence[int], length: int = 2) -> None:
    """Prompts of their own, each settled."""
    for number in numbers:
        world.clock.now_s += 1
        assert world.run(chain(number, *range(length - 1)))
        world.settle()
    world.store.check_integrity()


def tiers(world: World, names: Sequence[BlockHash]) -> list[str | None]:
    return [world.store.tier_of(name) for name in names]


# ---- down


def test_what_will_be_evicted_soon_is_copied_before() -> None:
    world = World(blocks=32, ddr_slots=32, ssd_slots=0)
    for number in range(14):
        world.run(chain(number, 0))
    available = world.pool.available
    world.pump()
    (job,) = world.io.jobs
    assert world.pool.available == available - 4, "an eighth of the pool at most, and they are held meanwhile"
    soon = {name for _, name in world.pool.upcoming(28)}
    world.io.end(job)
    world.pump()
    assert world.pool.available >= available - 4
    copied = [name for number in range(14) for name in chain(number, 0) if world.store.locate([name])]
    assert len(copied) == 4 and not soon.issuperset(copied)
    world.settle()
    assert {name for _, name in world.pool.upcoming(4)} <= {
        name for number in range(14) for name in chain(number, 0) if world.store.locate([name])
    }


def test_what_blocks_on_the_ssd_hang_on_goes_there_whatever_it_is_worth() -> None:
    world = World(ddr_slots=1, ssd_slots=3)
    world.settle()
    shelves = world.store._shelves
    names = [*chain(0, 0), *chain(1), *chain(2)]
    parents = [ROOT, names[0], ROOT, ROOT]
    tiers_: list[LowerTier] = ["ddr", "ssd", "ssd", "ssd"]
    for name, parent, tier, used_at in zip(names, parents, tiers_, [0.0, 900.0, 900.0, 900.0], strict=True):
        row = shelves.index.add(name, parent, int(parent != ROOT), TENANTS[0], used_at)
        (slot,) = shelves.slots[tier].take(1)
        shelves.put(row, tier, slot)
        world.io.ddr[slot] = content_of(name)
    assert world.store.tier_of(names[0]) == "ddr"
    world.settle()
    assert tiers(world, names).count("ssd") == 3 and world.store.tier_of(names[0]) == "ssd"
    world.store.check_integrity()


def test_bytes_in_flight_are_bounded() -> None:
    world = World(blocks=64, ddr_slots=64, bytes_in_flight_max=3 * ROW_BYTES)
    for number in range(30):
        world.run(chain(number, 0))
    for _ in range(10):
        world.pump()
        assert 0 < world.io.bytes_in_flight <= 3 * ROW_BYTES


def test_blocks_in_use_go_down_in_batches_and_the_last_when_nobody_uses_any() -> None:
    world = World(blocks=256, ddr_slots=256, ssd_slots=0, bytes_in_flight_max=PLENTY)
    names, blocks = chain(*range(20)), world.pool.allocate(20)

    def copied_once_there_are(count: int) -> int:
        first = len(world.pool.match(names).blocks)
        world.store.published(ROOT, names[:count], first, Owner(TENANTS[0]))
        for at in range(first, count):
            world.pool.publish(blocks[at], names[at])
        world.pump()
        copied = world.io.bytes_in_flight // ROW_BYTES
        world.io.end_all()
        world.pump()
        return copied

    assert [copied_once_there_are(count) for count in (1, BATCH - 1, BATCH, BATCH + 3)] == [0, 0, BATCH, 0]
    world.pool.release(blocks)
    world.settle()
    assert len(world.store.locate(names)) == BATCH + 3


def test_an_evicted_block_that_was_not_copied_yet_is_copied_at_once() -> None:
    world = World(blocks=8, ddr_slots=8)
    for number in range(1, 6):
        world.run(chain(number, 0))
    evicted = [name for number in range(1, 6) for name in chain(number, 0) if world.pool.find(name) is None]
    assert evicted and tiers(world, evicted) == ["ddr"] * len(evicted)


def test_leaves_go_first() -> None:
    world = World(blocks=8, ddr_slots=4, ssd_slots=0)
    for number in range(1, 30):
        fill(world, [number], 3)
        for prompt in (chain(n, 0, 1) for n in range(1, number)):
            places = tiers(world, prompt)
            below = [place for place in places if place != "hbm"]
            assert below == sorted(below, key=lambda place: place is None), "a block lies below without its head"


def test_what_ddr_has_no_room_for_goes_on_to_the_ssd_and_then_out() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=12)
    fill(world, range(1, 30))
    ddr, ssd = world.store.states()
    assert ddr.blocks <= 8
    assert 8 <= ssd.blocks <= 12
    assert world.store.dropped_blocks > 20
    assert tiers(world, chain(1, 0)) == [None, None]


def test_what_came_back_from_below_is_not_copied_again() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=12)
    fill(world, range(1, 8))
    names = chain(4, 0)
    assert tiers(world, names)[0] in ("ddr", "ssd")
    world.run(names)
    assert tiers(world, names) == ["hbm", "hbm"]
    assert world.store.locate(names), "its copies are still there"


def test_prompts_seen_once_do_not_push_out_what_is_used_again_and_again() -> None:
    world = World(blocks=16, ddr_slots=32, ssd_slots=0)
    world.store._worth._policy = make_policy(48)
    hot = [chain(number, 1, 2) for number in range(8)]
    found = asked = 0
    for turn in range(400):
        world.clock.now_s += 1
        world.run(chain(100 + turn, 9, 5))  # a scan
        if turn % 2:
            prompt = hot[turn // 2 % len(hot)]
            if turn > 200:
                asked += 3
                hits = len(world.pool.match(prompt).blocks)
                found += hits + len(world.store.locate(prompt[hits:]))
            world.run(prompt)
        world.settle()
    assert found > 0.9 * asked, (found, asked)


def test_the_last_copy_goes_later_than_a_duplicate() -> None:
    world = World(blocks=8, ddr_slots=24, ssd_slots=0)
    world.store._worth._policy = make_policy(32)
    for number in range(1, 9):
        world.run(chain(number, 0))
        world.settle()
    below = [number for number in range(1, 9) if tiers(world, chain(number, 0)) == ["ddr", "ddr"]]
    duplicates = below[1::2]
    world.store.note_copies([(name, 3) for number in duplicates for name in chain(number, 0)])
    world.clock.now_s += 10
    rows = [world.store._index.find(chain(number, 0)[1]) for number in below]
    values = world.store._worth.values(rows, world.clock())
    is_duplicate = np.array([number in duplicates for number in below])
    assert values[is_duplicate].max() < values[~is_duplicate].min()


# ---- up


def test_a_bad_block_is_forgotten_and_counted() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=12)
    fill(world, range(1, 8), 3)
    names = next(
        names
        for number in range(1, 8)
        if world.store.locate(names := chain(number, 0, 1)) == ["ssd"] * 3 and world.pool.find(names[0]) is None
    )
    for slot, (header, _) in world.io.ssd.items():
        if header.name == names[1]:
            world.io.ssd[slot] = header, 666
    world.run(names)
    world.pump()
    assert world.store.corrupt_blocks == 1
    world.settle()
    assert not any(content == 666 for _, content in world.io.ssd.values()), "it is off the disk"
    world.store.check_integrity()


def test_slots_stay_as_they_are_while_they_are_read() -> None:
    """The fake asserts that nobody writes them."""
    world = World(blocks=16, ddr_slots=4, ssd_slots=4)
    fill(world, range(1, 12))
    names = next(
        names for n in range(1, 12) if world.store.locate(names := chain(n, 0)) and not world.pool.find(names[0])
    )
    running = world.begin(names, Owner(TENANTS[0]))
    assert running is not None and isinstance(running.restore, FakeRestore)
    for number in range(20, 40):
        world.clock.now_s += 1
        running_beside = world.begin(chain(number, 0), Owner(TENANTS[0]))
        assert running_beside is not None
        world.finish(running_beside)
        world.pump()
        for job in tuple(world.io.jobs):
            world.io.end(job)
    running.restore.end()
    world.finish(running)
    world.settle()
    world.check(names)


# ---- promises


def test_what_was_promised_stays_until_it_is_over() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=8)
    kept = chain(1, 0)
    world.run(kept, Owner(TENANTS[0], ttl_s=100.0, quota_bytes=PLENTY))
    fill(world, range(2, 30))
    assert all(tiers(world, kept))
    assert sum(state.retained_bytes for state in world.store.states()) == 2 * ROW_BYTES
    world.wall.now_s += 101
    fill(world, range(30, 60))
    assert tiers(world, kept) == [None, None]


def test_a_promise_past_the_quota_is_not_given() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=8)
    owner = Owner(TENANTS[0], pin=True, quota_bytes=2 * ROW_BYTES)
    first, second = chain(1, 0), chain(2, 0)
    world.run(first, owner)
    world.run(second, owner)
    fill(world, range(3, 40))
    assert all(tiers(world, first))
    assert tiers(world, second) == [None, None]


def test_one_tenants_promises_do_not_count_for_another() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=8)
    for number, tenant in enumerate(TENANTS, 1):
        world.run(chain(number, 0), Owner(tenant, pin=True, quota_bytes=2 * ROW_BYTES))
    fill(world, range(3, 40))
    assert all(tiers(world, chain(1, 0)) + tiers(world, chain(2, 0)))


def test_a_promise_outlives_the_process() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=8)
    kept = chain(1, 0)
    world.run(kept, Owner(TENANTS[0], ttl_s=1000.0, quota_bytes=PLENTY))
    fill(world, range(2, 30))
    assert all(header.keep_until for header, _ in world.io.ssd.values() if header.name in kept)
    assert sum(header.name in kept for header, _ in world.io.ssd.values()) == 2
    again = World(blocks=8, ddr_slots=8, ssd_slots=8, ssd=world.io.ssd, wall=world.wall)
    again.settle()
    fill(again, range(30, 60))
    assert tiers(again, kept) == ["ssd", "ssd"]
    again.wall.now_s += 1001
    fill(again, range(60, 90))
    assert tiers(again, kept) == [None, None]


def test_what_a_peer_is_about_to_read_is_not_dropped() -> None:
    world = World(blocks=8, ddr_slots=12, ssd_slots=0)
    fill(world, [1, 2, 3, 4, 5, 6])
    names = next(names for n in range(1, 6) if tiers(world, names := chain(n, 0)) == ["ddr", "ddr"])
    world.store.pin(names, world.clock() + 50)
    fill(world, range(10, 40))
    assert tiers(world, names) == ["ddr", "ddr"]
    world.clock.now_s += 60
    fill(world, range(40, 70))
    assert tiers(world, names) == [None, None]


# ---- the disk


def test_a_failing_disk_turns_its_tier_off_and_serving_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=12)
    fill(world, range(1, 10))
    with caplog.at_level(logging.WARNING):
        for number in range(20, 40):
            world.run(chain(number, 0))
            world.pump()
            for job in tuple(world.io.jobs):
                world.io.end(job, DISK_ERROR)
        fill(world, range(40, 60))
    ssd = world.store.states()[1]
    assert "Input/output error" in ssd.off_reason
    assert ssd.blocks == 0
    assert world.store.states()[0].blocks > 0
    world.store.check_integrity()
    assert len(caplog.records) == 1, "it is said once"


def test_blocks_of_an_earlier_process_are_found_while_the_scan_runs() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=12)
    fill(world, range(1, 30))
    names = next(names for n in range(1, 30) if tiers(world, names := chain(n, 0)) == ["ssd", "ssd"])
    again = World(blocks=8, ddr_slots=8, ssd_slots=12, ssd=world.io.ssd)
    again.run(names)  # computed anew while nothing is known of the disk
    again.settle()
    again.check(names)
    assert again.store.states()[1].blocks >= world.store.states()[1].blocks - 2
    others = [names for n in range(1, 30) if again.store.locate(names := chain(n, 0))]
    assert len(others) >= 4


def test_clear_takes_everything_off_the_disk_even_what_was_dropped() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=12)
    fill(world, range(1, 30))
    world.pool.forget(world.pool.published())
    dropped = world.store.dropped_blocks
    blocks, size_bytes = world.store.clear(None)
    assert blocks > 0 and size_bytes >= blocks * ROW_BYTES
    assert world.store.dropped_blocks == dropped, "nothing was dropped for want of room"
    world.settle()
    assert world.io.ssd == {}
    assert not any(world.store.locate(chain(number, 0)) for number in range(1, 30))
    world.store.check_integrity()


def test_what_is_cleared_on_its_way_down_does_not_arrive_under_another_name() -> None:
    world = World(blocks=32, ddr_slots=32, ssd_slots=0)
    world.run(chain(1, 0))
    world.pump()
    assert world.io.jobs
    world.pool.forget(world.pool.published())
    world.store.clear(None)
    world.run(chain(2, 0))  # in rows that were just given up
    world.io.end_all()
    world.pump()
    world.check([*chain(1, 0), *chain(2, 0)])
    world.settle()
    world.check([*chain(1, 0), *chain(2, 0)])
    assert not world.store.locate(chain(1, 0))
    world.pool.forget(world.pool.published())
    running = world.begin(chain(2, 0), Owner(TENANTS[0]))
    world.io.end_all()
    assert running is not None
    world.finish(running)  # asserts the content


# ---- what is told


def test_the_hottest_prefixes_are_told_by_their_deepest_block() -> None:
    world = World(blocks=32, ddr_slots=8, ssd_slots=8)
    shared, long = chain(1, 2), chain(1, 2, 3, 4)
    for _ in range(3):
        world.run(long)
    for number in range(10, 15):
        world.run([*shared, *chain(1, 2, number)[2:]])
    first, second = world.store.hottest(2)
    assert (first.name, first.depth, first.uses, first.tier) == (shared[-1], 1, 7, "hbm")
    assert (second.name, second.uses) == (long[-1], 2)


def test_doubtful_blocks_are_asked_for_once_their_tier_is_full() -> None:
    world = World(blocks=8, ddr_slots=8, ssd_slots=60)
    fill(world, range(1, 5))
    assert not world.store.doubtful(4)
    fill(world, range(5, 60))
    names = world.store.doubtful(4)
    assert 0 < len(names) <= 4
    world.store.note_copies([(name, 0) for name in names])
    assert not set(names) & set(world.store.doubtful(12))
