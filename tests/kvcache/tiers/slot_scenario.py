"""What a worker may do to its slot file, by a seed, and what must be in the file afterwards."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from crash_rig import Done
from slot_rig import name_of, open_file, slots_from, write_blocks

from baton.ids import BlockHash
from kvcache.tiers.disk.disk_calls import DiskCalls

Kind = Literal["open", "write", "erase", "erase_all"]
KINDS: dict[Kind, int] = {"write": 12, "erase": 2, "erase_all": 1, "open": 2}
"""By how often."""
SLOTS = 12
RUN_MAX = 4


@dataclass(frozen=True)
class Step:
    """Of a scenario. `open` is always the first."""

    kind: Kind
    first: int = 0
    names: tuple[BlockHash, ...] = ()
    """Written; or, how many are erased."""
    slots: int = 0
    """Of the opened file."""


def steps_of(seed: int) -> list[Step]:
    random = Random(f"steps {seed}")
    steps, slots = [Step("open", slots=SLOTS)], SLOTS
    for number in range(1, random.randint(6, 14)):
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "open":
            slots = random.choice((SLOTS - 3, SLOTS, SLOTS + 4))
            steps.append(Step("open", slots=slots))
        else:
            count = random.randint(1, RUN_MAX)
            names = tuple(name_of(f"{seed} {number} {i}") for i in range(count))
            steps.append(Step(kind, random.randint(0, slots - count), names))
    return steps


def scenario(directory: Path, seed: int, calls: DiskCalls, done: Done) -> None:
    with ExitStack() as stack:
        for number, step in enumerate(steps_of(seed), 1):
            if step.kind == "open":
                stack.close()
                file = open_file(directory, step.slots, calls=calls)
                stack.callback(file.close)
            elif step.kind == "write":
                write_blocks(file, step.first, list(step.names))
            elif step.kind == "erase":
                file.erase(slots_from(step.first, len(step.names)))
            else:
                file.erase_all()
            done(number)


@dataclass
class Expected:
    """What the slots hold after some steps."""

    held: dict[int, BlockHash] = field(default_factory=dict)
    past: set[tuple[int, BlockHash]] = field(default_factory=set)
    """What they held before."""
    slots: int = SLOTS

    def after(self, step: Step) -> None:
        touched = self.touched_by(step)
        self.past |= {(slot, name) for slot, name in self.held.items() if slot in touched}
        self.held = {slot: name for slot, name in self.held.items() if slot not in touched}
        self.held |= self.written_by(step)
        self.slots = step.slots or self.slots

    def written_by(self, step: Step) -> dict[int, BlockHash]:
        return dict(enumerate(step.names, step.first)) if step.kind == "write" else {}

    def touched_by(self, step: Step) -> set[int]:
        if step.kind == "erase_all":
            return set(self.held)
        if step.kind == "open":
            return {slot for slot in self.held if slot >= step.slots}
        return set(range(step.first, step.first + len(step.names)))
