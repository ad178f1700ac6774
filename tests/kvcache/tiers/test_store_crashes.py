"""A whole worker's cache killed in the middle of writing: what it finds when it starts anew is right, and most of what
was written is there."""

from itertools import count
from pathlib import Path
from random import Random

from crash_rig import Done, killed_at_seeded_points

from kvcache.tiers.disk.disk_calls import DiskCalls
from tests.kvcache.tiers.store_rig import StoreRig
from tests.kvcache.tiers.store_world import chain

SEEDS = range(40)
PROMPTS = 24
STEPS = 24
SSD_SLOTS = 24
"""Fewer than there are blocks: slots are written again and again."""


def prompt_of(number: int) -> list[bytes]:
    return chain(number, 1, 2)


def scenario(directory: Path, seed: int, calls: DiskCalls, done: Done) -> None:
    """Serves prompts, and clears a tenant's now and then. How many calls that takes is a little different each time, as
    threads are: so the worker that is to be killed goes on until it is."""
    random, now_s = Random(f"store {seed}"), count(1.0)
    rig = StoreRig(directory, blocks=12, ddr_slots=8, ssd_slots=SSD_SLOTS, calls=calls, clock=lambda: next(now_s) / 100)
    is_doomed = directory.name.startswith("killed")
    for step in count(1):
        if step > STEPS and not is_doomed:
            break
        rig.run(prompt_of(random.randrange(PROMPTS)))
        rig.settle()
        if random.random() < 0.03:
            journal(directory).write_text("0")  # killed from here on, what is missing was to go
            rig.pool.forget(rig.pool.published())
            rig.store.clear(None)
            rig.settle()
        assert not rig.wrong
        journal(directory).write_text(str(rig.store.states()[1].blocks))
        done(step)
    rig.close()


def journal(directory: Path) -> Path:
    """How many blocks lay on the disk after the last step."""
    return directory.with_suffix(".journal")


def test_killed_at_any_point_nothing_wrong_is_served(tmp_path: Path) -> None:
    written = there = 0
    for one in killed_at_seeded_points(scenario, tmp_path, SEEDS):
        again = StoreRig(one.directory, blocks=12, ddr_slots=8, ssd_slots=SSD_SLOTS)
        again.settle()
        again.store.check_integrity()
        if one.done:
            written += int(journal(one.directory).read_text())
        torn = again.store.states()[1].blocks
        for number in range(PROMPTS):
            for name in prompt_of(number):
                if again.store.locate([name]):
                    blocks = again.pool.allocate(1)
                    result = again.store.restore([name], blocks).wait(10.0)
                    assert result is not None
                    assert result.good == 0 or again.is_right(blocks[0], name), one
                    torn -= result.good
                    there += result.good
                    again.pool.release(blocks)
        assert torn <= 8, f"{one}: more blocks are torn than one call writes"
        again.settle()
        again.store.check_integrity()
        again.close()
    assert written > 100
    assert there >= 0.9 * written, f"{there} of {written}"
    print(f"{there} of {written} blocks are there")
