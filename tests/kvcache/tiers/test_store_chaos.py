"""Seeded interleavings of everything that can happen to a store, with everything looked at after each step."""

import pytest

from tests.kvcache.tiers.store_world import Chaos

RUNS = 4
SEEDS = 75
STEPS = 60


@pytest.mark.parametrize("run", range(RUNS))
def test_whatever_happens_nothing_is_lost_mixed_up_or_over_its_limit(run: int) -> None:
    for seed in range(run * SEEDS, (run + 1) * SEEDS):
        chaos = Chaos(seed)
        for step in range(STEPS):
            try:
                chaos.step()
            except BaseException as error:
                error.add_note(f"seed {seed}, step {step}")
                raise
        chaos.end()
