"""What is copied down, and on to the disk, before anything must go: so that nothing is lost when it must."""

from collections.abc import Sequence

from baton.ids import BlockHash
from tests.kvcache.tiers.store_world import ROW_BYTES, World, chain

PROMPT_BLOCKS = 256


def long_prompt(number: int, blocks: int = PROMPT_BLOCKS) -> list[BlockHash]:
    return chain(number, *range(blocks - 1))


def below_hbm(world: World, names: Sequence[BlockHash]) -> int:
    return len(world.store.locate(names))


def serve_in_turn(world: World, prompts: Sequence[Sequence[BlockHash]], turns_of_io: int) -> None:
    """Each after the other, and in between so many rounds of I/O."""
    for names in prompts:
        world.clock.now_s += 1
        assert world.run(names)
        for _ in range(turns_of_io):
            world.pump()
            world.io.end_all()
        world.store.check_integrity()


def tight_world() -> World:
    """HBM and DDR have room for a prompt and a bit each, the SSD for many."""
    return World(blocks=300, ddr_slots=320, ssd_slots=4032, bytes_in_flight_max=256 * ROW_BYTES)


def test_nothing_is_dropped_while_the_ssd_has_room_and_the_io_keeps_up() -> None:
    world, prompts = tight_world(), [long_prompt(number) for number in range(3)]
    serve_in_turn(world, prompts * 2, turns_of_io=30)
    assert world.store.dropped_blocks == 0
    places = [world.store.tier_of(name) for names in prompts for name in names]
    assert places.count(None) == 0
    assert world.io.copied_now == 0 or world.store.states()[1].blocks > 2 * PROMPT_BLOCKS


def test_io_that_does_not_keep_up_loses_what_there_was_no_room_for_at_once() -> None:
    """Without any time between the prompts."""
    world, prompts = tight_world(), [long_prompt(number) for number in range(3)]
    serve_in_turn(world, prompts, turns_of_io=0)
    assert 0 < world.store.dropped_blocks <= 3 * PROMPT_BLOCKS - 300 - 256


def test_idle_blocks_are_all_copied_though_nothing_is_evicted() -> None:
    world = World(blocks=64, ddr_slots=80, ssd_slots=0, bytes_in_flight_max=1000 * ROW_BYTES)
    names = long_prompt(1, 40)
    world.run(names)
    world.pump()
    assert world.pool.used <= 64 // 8, "an eighth of the pool is held at one time at most"
    world.settle()
    assert below_hbm(world, names) == 40
    assert world.pool.used == 0


def test_without_room_below_only_what_goes_soon_is_copied() -> None:
    world = World(blocks=64, ddr_slots=8, ssd_slots=0)
    world.run(long_prompt(1, 40))
    world.settle()
    assert world.store.states()[0].blocks <= 8
    assert world.store.dropped_blocks == 0


def test_heads_are_backed_up_before_tails_and_stay_in_ddr() -> None:
    world = World(blocks=64, ddr_slots=64, ssd_slots=128, bytes_in_flight_max=32 * ROW_BYTES)
    names = long_prompt(1, 40)
    world.run(names)
    seen = 0
    for _ in range(60):
        world.pump()
        world.io.end_all()
        on_disk = {header.name for header, _ in world.io.ssd.values()}
        assert on_disk == set(names[: len(on_disk)]), "a block on the disk without its head"
        seen += 0 < len(on_disk) < 40
    assert seen and len(on_disk) == 40
    assert world.store.states()[0].blocks == 40


def test_after_a_kill_whole_prefixes_are_found() -> None:
    world = World(blocks=64, ddr_slots=64, ssd_slots=128)
    names = long_prompt(1, 40)
    world.run(names)
    world.settle()
    again = World(blocks=64, ddr_slots=64, ssd_slots=128, ssd=world.io.ssd)
    again.settle()
    assert below_hbm(again, names) == 40


def test_a_disk_that_is_nearly_full_takes_only_what_was_used_again() -> None:
    world = World(blocks=16, ddr_slots=64, ssd_slots=16, bytes_in_flight_max=64 * ROW_BYTES)
    for number in range(5):
        world.run(long_prompt(number, 8))
        world.settle()
    assert world.store.states()[1].blocks == 14, "one slot in eight stays free"
    again = next(names for n in range(5) if not on_disk(world, names := long_prompt(n, 8)))
    world.run(again)
    world.clock.now_s += 1  # uses are counted a little later
    world.settle()
    assert on_disk(world, again) == 2, "what there is room for, from the head on"


def on_disk(world: World, names: Sequence[BlockHash]) -> int:
    there = {header.name for header, _ in world.io.ssd.values()}
    return sum(name in there for name in names)


def test_ddr_gives_up_what_the_disk_has_too_before_a_newcomer_is_dropped() -> None:
    world = World(blocks=16, ddr_slots=16, ssd_slots=200, bytes_in_flight_max=64 * ROW_BYTES)
    for number in range(14):
        world.clock.now_s += 1
        world.run(long_prompt(number, 12))
        world.settle()
    assert world.store.dropped_blocks == 0
    assert all(on_disk(world, long_prompt(number, 12)) == 12 for number in range(14))
    in_ddr_alone = [name for n in range(14) for name in long_prompt(n, 12) if world.store.locate([name]) == ["ddr"]]
    copied = world.io.copied_now
    world.pump()
    for number in range(20, 22):
        world.run(long_prompt(number, 12))  # no time to copy: evicts what came just before
    assert world.io.copied_now > copied and in_ddr_alone
    assert world.store.dropped_blocks == 0
