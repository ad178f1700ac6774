"""Seeded interleavings of copies down, restores, cancels and the end; the disk is slow, fails and flips bits."""

import threading
from random import Random
from typing import get_args

import pytest
from io_rig import BLOCK_BYTES, LAYOUT, WAIT_S, Rig, rig_of

from baton.ids import BlockId
from kvcache.tiers.interface import LowerTier, Slot
from kvcache.tiers.io.job import Job
from kvcache.tiers.io.restore import RestoreJob

SEEDS = 1000
STEPS = 12
STORED = 24
"""Blocks that lie below at first, in slots of their own; the pool's blocks from here on are restored into."""
BYTES_MAX = 9 * BLOCK_BYTES


class Faults:
    """Of each call to the disk, from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(f"disk {seed}")
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            return self._random.choices(["", "slow", "fail", "flip", "hang"], [12, 6, 2, 2, 0.5])[0]


class Run:
    """One interleaving, and what must hold after each step and at the end."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.random = rig, Random(f"steps {seed}")
        self.jobs: list[Job[list[int | None]] | Job[None]] = []
        self.restores: list[tuple[RestoreJob, list[int], list[int]]] = []
        self.poisoned: set[int] = set()
        self.pool_free = list(range(STORED, LAYOUT.pool_blocks))
        self.slots_free = list(range(STORED, LAYOUT.blocks))
        self.corrupt_ddr: set[int] = set()

    def step(self) -> None:
        steps = [self.offload, self.demote, self.restore, self.restore, self.cancel, self.await_layer, self.corrupt]
        self.random.choice([*steps, self.release, self.erase])()
        assert 0 <= self.rig.io.bytes_in_flight <= BYTES_MAX
        self.settle()

    def offload(self) -> None:
        blocks = self.random.sample(range(STORED), self.random.randint(1, 6))
        if len(self.slots_free) >= len(blocks) and self.rig.io.has_room_for(len(blocks) * BLOCK_BYTES):
            slots = [Slot(self.slots_free.pop()) for _ in blocks]
            known = [self.random.choice([None, self.rig.digests[block]]) for block in blocks]
            self.jobs.append(self.rig.io.offload([BlockId(block) for block in blocks], slots, known))

    def demote(self) -> None:
        indices = self.random.sample(range(STORED), self.random.randint(1, 6))
        if len(self.slots_free) >= len(indices) and self.rig.io.has_room_for(len(indices) * BLOCK_BYTES):
            slots = [Slot(self.slots_free.pop()) for _ in indices]
            headers = [self.rig.header(index) for index in indices]
            self.jobs.append(self.rig.io.demote([Slot(index) for index in indices], slots, headers))

    def erase(self) -> None:
        if self.slots_free:
            self.jobs.append(self.rig.io.erase([Slot(self.slots_free.pop())]))

    def restore(self) -> None:
        count = self.random.randint(1, 8)
        if len(self.pool_free) < count:
            return
        first = self.random.randint(0, STORED - count)
        indices = list(range(first, first + count))
        places = [self.pool_free.pop(self.random.randrange(len(self.pool_free))) for _ in indices]
        tiers: tuple[LowerTier, ...] = get_args(LowerTier)
        parts = [self.rig.part(self.random.choice(tiers), i, p) for i, p in zip(indices, places, strict=True)]
        self.restores.append((self.rig.io.restore(parts), indices, places))

    def cancel(self) -> None:
        if self.restores:
            self.random.choice(self.restores)[0].cancel()

    def await_layer(self) -> None:
        if self.restores:
            job = self.random.choice(self.restores)[0]
            job.wait_layer(self.random.randrange(LAYOUT.layers), self.random.choice([0, 0.0003]))

    def corrupt(self) -> None:
        """A bit of DDR that no restore has been asked for yet may be anything."""
        index = self.random.randrange(STORED)
        if not self.restores and not self.jobs:
            self.rig.ddr.rows[index, self.random.randrange(BLOCK_BYTES)] ^= 1 << self.random.randrange(8)

    def release(self) -> None:
        self.rig.file.release()

    def settle(self) -> None:
        """What has ended is right as far as it says, and from now on nobody but us writes there."""
        running = []
        for job, indices, places in self.restores:
            result = job.result
            if result is None:
                running.append((job, indices, places))
                continue
            for index, block in list(zip(indices, places, strict=True))[: result.good]:
                assert self.rig.block(block) == self.rig.content(index), "said to be good"
            assert result.digests == tuple(self.rig.digests[index] for index in indices[: result.good])
            assert bool(result.reason) == (result.good < len(places))
            self.rig.poison(places)
            self.poisoned.update(places)
        self.restores = running

    def end(self) -> None:
        is_closed_early = self.random.random() < 0.4
        if is_closed_early and not self.rig.file.hangs.is_set():
            self.rig.file.release()
            self.rig.io.close()
        self.rig.file.release()
        for job in self.jobs:
            assert job.wait(WAIT_S)
        for restore, _, _ in self.restores:
            assert restore.wait(WAIT_S) is not None
        self.settle()
        assert not self.restores and self.rig.io.bytes_in_flight == 0
        self.rig.io.close()
        assert self.rig.file.at_once_max <= 1
        assert all(self.rig.is_poisoned(block) for block in self.poisoned), "written after it had ended"
        for block in range(STORED):
            assert self.rig.block(block) == self.rig.content(block), "nobody restores there"


@pytest.mark.parametrize("part", range(10))
def test_no_wrong_block_is_good_and_none_is_written_late(part: int) -> None:
    for seed in range(part * SEEDS // 10, (part + 1) * SEEDS // 10):
        try:
            interleave(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def interleave(seed: int) -> None:
    with rig_of(seed, faults=Faults(seed), bytes_max=BYTES_MAX) as rig:
        rig.fill(list(range(STORED)))
        run = Run(rig, seed)
        for _ in range(STEPS):
            run.step()
        run.end()
