"""A worker killed in the middle of anything finds what it had written, and nothing else, when it starts anew."""

from collections import Counter
from pathlib import Path

from crash_rig import Killed, killed_at_seeded_points
from slot_rig import is_served, name_of, opened, read_block, scanned, write_blocks
from slot_scenario import Expected, scenario, steps_of

from kvcache.tiers.interface import Slot

SEEDS = range(120)


def test_killed_at_any_point_of_any_write(tmp_path: Path) -> None:
    killed = killed_at_seeded_points(scenario, tmp_path, SEEDS)
    assert [one.seed for one in killed] == list(SEEDS)
    seen: Counter[str] = Counter()
    for one in killed:
        seen += check(one)
    # the rig has teeth: each kind of tear was there to be seen
    assert min(seen[kind] for kind in ("open", "write", "erase", "erase_all")) >= 5, seen
    assert seen["torn payload"] >= 10 and seen["half a run"] >= 3 and seen["kept"] >= 200, seen


def check(killed: Killed) -> Counter[str]:
    """What its file holds, against what must be in it; what there was to see."""
    steps, expected = steps_of(killed.seed), Expected()
    for step in steps[: killed.done]:
        expected.after(step)
    torn = steps[killed.done]
    touched, written = expected.touched_by(torn), expected.written_by(torn)
    seen: Counter[str] = Counter([torn.kind])
    with opened(killed.directory, torn.slots or expected.slots) as file:
        found = scanned(file)
        served = {slot: header.name for slot, header in found.items() if is_served(file, slot, header.name)}
        context = f"{killed}, in {torn}"
        for slot, name in expected.held.items():
            if slot not in touched:
                assert served.get(Slot(slot)) == name, context
                seen["kept"] += 1
        for slot, name in served.items():
            allowed = {expected.held.get(slot), written.get(slot)} if slot in touched else {expected.held.get(slot)}
            assert name in allowed, context
        if torn.kind == "erase_all":
            assert not served or served == expected.held, context
        for slot in found.keys() - served.keys():
            assert slot in touched, context
            seen["torn payload"] += 1
        for slot, name in expected.past:
            assert slot >= file.slots or read_block(file, slot, name)[0] is None, context
        seen["half a run"] += 0 < len(written.items() & served.items()) < len(written)
        # and it goes on as any other file
        fresh = [name_of(f"after {killed.seed} {i}") for i in range(file.slots)]
        write_blocks(file, 0, fresh)
        assert all(is_served(file, slot, name) for slot, name in enumerate(fresh)), context
    return seen
